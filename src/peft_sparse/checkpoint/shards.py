"""Turn a folder that `save_pretrained` wrote into a packed one, tensor by tensor (the format: storage/format.py)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peft_sparse.sparsity import find_pattern
from peft_sparse.storage.files import SafetensorsFile, crc32
from peft_sparse.storage.folders import plain_files, read_config
from peft_sparse.storage.format import (
    BITMASK,
    FORMAT,
    INDEX_NAME,
    VALUES,
    VERSION,
    WEIGHTS_NAME,
    config_crc32,
    file_metadata,
    pack_weight,
)
from peft_sparse.storage.origin import CONFIG_KEY, facts_of


def pack_folder(
    folder: Path,
    max_shard_size: int,
    transposed: set[str],
    others: Iterable[tuple[str, torch.Tensor]],
    facts: dict[str, str | None],
) -> None:
    """Replace the dense files of a folder by packed ones, and say so in its config.json.

    Args:
        folder: nobody else uses it.
        max_shard_size: in bytes.
        transposed: names of the weights that are stored as (in, out).
        others: tensors that are not in the folder and belong there.
        facts: what to write about the model itself, see `storage/origin.py`, where it is not None.
    """
    shards = ShardWriter(folder, max_shard_size, transposed)
    for file in plain_files(folder):
        for name in file.header:
            shards.add(name, file.read(name))
        file.path.unlink()
    for name, tensor in others:
        shards.add(name, tensor)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    finish(folder, shards, facts)


def finish(folder: Path, shards: ShardWriter, facts: dict[str, str | None]) -> None:
    """Write the last shard, the index if there are several, and config.json's entry."""
    names = shards.finish()
    if shards.turned:
        warnings.warn(
            f"{sum(shards.turned.values()):,} zeros in {len(shards.turned)} tensors are negative, as `weight * mask` "
            f"leaves them (the first are in `{next(iter(shards.turned))}`); they are stored as zeros, without their "
            "sign, since each would take the room of a weight otherwise.",
            stacklevel=4,
        )
    checksums = {name: SafetensorsFile(folder / name).header_crc32 for name in names}
    code = sorted(path.name for path in folder.glob("*.py"))
    for name in (INDEX_NAME, "generation_config.json", *code):
        if (folder / name).is_file():
            checksums[name] = crc32((folder / name).read_bytes())
    config = read_config(folder) or {}
    known = facts_of(config.get(CONFIG_KEY)) | {key: value for key, value in facts.items() if value is not None}
    config[CONFIG_KEY] = known | {
        "format": FORMAT,
        "version": VERSION,
        "sparsity": round(shards.zeros / max(shards.numel, 1), 6),
        "modules": dict(sorted(shards.modules.items())),
        "files": checksums,
    }
    config[CONFIG_KEY]["crc32"] = config_crc32(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class ShardWriter:
    """Packs tensor after tensor, and writes a shard whenever the next one would not fit in.

    Attributes:
        modules: pattern and sparsity of each packed weight, by module.
        zeros, numel: of all packed weights together.
        turned: by name, how many negative zeros became positive ones.
    """

    def __init__(self, folder: Path, max_shard_size: int, transposed: set[str]) -> None:
        self.folder, self.max_shard_size, self.transposed = folder, max_shard_size, transposed
        self.modules: dict[str, dict[str, Any]] = {}
        self.zeros, self.numel, self._total = 0, 0, 0
        self.turned: dict[str, int] = {}
        self._shards: list[list[str]] = []  # the names in each file so far
        self._tensors: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, list[int]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor, packed if that pays."""
        packed = pack_weight(tensor)
        if packed is None:
            self._add({name: tensor.contiguous()})
            return
        matrix = tensor.reshape(-1, tensor.shape[-1])
        self._note(name, matrix.T if name in self.transposed else matrix)
        if packed.turned:
            self.turned[name] = packed.turned
        self._add({name + VALUES: packed.values, name + BITMASK: packed.bitmask})
        self._shapes[name] = list(tensor.shape)

    def _note(self, name: str, matrix: torch.Tensor) -> None:
        zeros = int((matrix == 0).sum())
        self.zeros, self.numel = self.zeros + zeros, self.numel + matrix.numel()
        found = {"pattern": find_pattern(matrix), "sparsity": round(zeros / matrix.numel(), 6)}
        self.modules[name.removesuffix(".weight")] = found

    def _add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and sum(tensor.nbytes for tensor in self._tensors.values()) + size > self.max_shard_size:
            self._flush()
        self._tensors |= tensors
        self._total += size

    def _flush(self) -> None:
        checksums = {key: crc32(tensor) for key, tensor in self._tensors.items()}
        self._shards.append(list(self._tensors))
        path = self.folder / _shard_name(len(self._shards))
        save_file(self._tensors, path, file_metadata(self._shapes, checksums))
        self._tensors, self._shapes = {}, {}

    def finish(self) -> list[str]:
        """Write what is left, and an index if there are several files.

        Returns:
            The names of the files of tensors.
        """
        if self._tensors or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [_shard_name(number, count) for number in range(1, count + 1)]
        for number, name in enumerate(names, start=1):
            (self.folder / _shard_name(number)).rename(self.folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return names


def _shard_name(number: int, count: int | None = None) -> str:
    """The final name of a shard; without `count`, the one that it has until all are written."""
    stem, suffix = WEIGHTS_NAME.split(".")
    if count == 1:
        return WEIGHTS_NAME
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}" if count else f"{stem}-{number:05d}.{suffix}"
