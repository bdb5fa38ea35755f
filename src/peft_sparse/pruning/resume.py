"""Runs that can be interrupted: each block's pruned weights go to a folder as soon as it is done.

    <folder>/pruning_run.json              what run this is (its fingerprint), and which blocks it has
    <folder>/<name of block>.safetensors   the weights of the block's linears as (out, in), by full name

A file is written beside its place and moved there, so one that is there is whole unless something else damaged it,
which its checksum tells; such a block is pruned again. A run is done if its blocks have all that it prunes, whatever
their list says. Every file carries the digest of its run's fingerprint: method, pattern, sparsity of each linear,
calibration data, and all weights of the model as it came, with the config that says what it computes with them. The
result depends on each of them, so another run is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedConfig

from peft_sparse.linears import stored_state
from peft_sparse.storage import CONFIG_KEY

MANIFEST = "pruning_run.json"
FORMAT = 1
# Fields of a config, also of its parts, that may differ from one start of a run to the next.
NOT_DECIDING = {
    CONFIG_KEY, "architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class SavedBlock:
    """A block that is done: its pruned weights (out, in) and the errors of its linears' outputs, by full name."""

    tensors: dict[str, torch.Tensor]
    errors: dict[str, float]


class Checkpoint:
    """The folder of one run.

    Args:
        folder: made if it is not there, unless `make` is False.
        fingerprint: all that the result depends on, as plain JSON values.
        with_errors: whether the errors of outputs are wanted; a block that was saved without them is pruned again.

    Raises:
        ValueError: if the folder cannot be used, or has another run or something else in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: dict[str, Any],
        with_errors: bool = False,
        make: bool = True,
    ) -> None:
        self.folder, self.with_errors = Path(folder), with_errors
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()
        check_run_folder(self.folder)
        try:
            if make:
                self.folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(self._manifest.read_bytes()) if self._manifest.exists() else None
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`checkpoint_dir` is a folder for the state of one pruning run, got {str(folder)!r}, which cannot be "
                f"used ({error}); name another folder, or delete this one."
            ) from error
        self._check_same(found)
        self.blocks: list[str] = [] if found is None else found["blocks"]

    @property
    def _manifest(self) -> Path:
        return self.folder / MANIFEST

    def _check_same(self, found: Any) -> None:
        if found is None:
            return
        whole = (
            isinstance(found, dict) and isinstance(found.get("run"), dict) and isinstance(found.get("blocks"), list)
        )
        if not whole or found.get("format") != FORMAT:
            raise ValueError(
                f"`checkpoint_dir` has the state of a run in format {FORMAT}, got something else in "
                f"{str(self._manifest)!r}; name another folder."
            )
        if found["run"] != self.fingerprint:
            raise ValueError(
                f"`checkpoint_dir` continues the run that it was made by, got another one in {str(self.folder)!r}: "
                f"{'; '.join(_differences(found['run'], self.fingerprint))}. Call with the same arguments and the "
                "model as it was before pruning, or name another folder. Nothing was pruned."
            )

    def set_blocks(self, names: Iterable[str]) -> None:
        """Note the blocks that the run prunes, in order."""
        self.blocks = list(names)
        content = {"format": FORMAT, "run": self.fingerprint, "blocks": self.blocks}
        _write(self._manifest, json.dumps(content, indent=1).encode())

    def is_finished(self, targets: Iterable[str]) -> bool:
        """Whether every block of the run is there and whole, and they have all linears that the run prunes."""
        there: list[str] = []
        for name in self.blocks:
            saved = self.load(name)
            if saved is None:
                return False
            there += saved.tensors
        return sorted(there) == sorted(targets)

    def load(self, block: str) -> SavedBlock | None:
        """What was saved of a block; None if nothing was, or not all that is wanted.

        Raises:
            ValueError: if it is of another run.
        """
        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            _warn_broken(path, str(error))
            return None
        if metadata.get("run") != self.digest:
            raise ValueError(
                f"`checkpoint_dir` continues the run that it was made by, got {str(path)!r} of another run; name "
                "another folder, or delete that file. Nothing was pruned."
            )
        text = metadata.get("errors", "")
        if metadata.get("crc32") != _checksum(tensors, text):
            _warn_broken(path, "its checksum is wrong")
            return None
        errors = json.loads(text)
        if self.with_errors and not errors:
            return None
        return SavedBlock(tensors, errors if self.with_errors else {})

    def save(self, block: str, tensors: dict[str, torch.Tensor], errors: dict[str, float]) -> None:
        """Write a block that is done."""
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        text = json.dumps(errors)
        metadata = {"run": self.digest, "crc32": _checksum(tensors, text), "errors": text}
        _write(self._path(block), save(tensors, metadata))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def check_run_folder(folder: str | os.PathLike[str]) -> None:
    """Hidden files do not count: a run that was killed before its first block may have left one.

    Raises:
        ValueError: if there is something in the folder, such as a model, and no run."""
    folder = Path(folder)
    there = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if there and MANIFEST not in there:
        raise ValueError(
            f"`checkpoint_dir` is a new folder, or that of an earlier run with its {MANIFEST}, got {str(folder)!r}, "
            f"which has none and is not empty ({there[0]!r} is in it); choose another name."
        )


def _warn_broken(path: Path, why: str) -> None:
    warnings.warn(f"The block in {str(path)!r} cannot be read ({why}) and is pruned again.", stacklevel=5)


def _write(path: Path, content: bytes) -> None:
    """Either all of it or nothing is at `path` afterwards, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there after an error: the disk is full, or somebody interrupts


def _checksum(tensors: dict[str, torch.Tensor], errors: str) -> str:
    value = zlib.crc32(errors.encode())
    for name in sorted(tensors):
        value = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _bytes(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor as a buffer."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_meta:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """[`hash_tensors`] of all weights and buffers that a checkpoint of the model has, wherever they are kept."""
    return hash_tensors(stored_state(model))


def deciding_config(model: nn.Module) -> dict[str, Any]:
    """What the config of a model of transformers says about its function, as plain JSON values: two models with the
    same weights may have other heads or activations. Not where it is from, and what a forward writes into it."""
    config = getattr(model, "config", None)
    return _deciding(json.loads(config.to_json_string())) if isinstance(config, PreTrainedConfig) else {}


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in NOT_DECIDING and not key.startswith("_")}
    return {key: _deciding(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    told = []
    for key in dict.fromkeys((*here, *there)):
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inside = _differences(old, new)
            told.append(f"{key} differ in {len(inside)} places, the first is {inside[0]}")
        else:
            told.append(f"{key} was {old!r} and is {new!r}")
    return told
