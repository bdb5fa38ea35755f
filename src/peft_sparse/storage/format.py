"""Packed format v1: a folder with config.json and `sparse_model*.safetensors`.

A weight `<name>` that is packed is stored as `<name>.values`, (nnz,), its entries in row-major order, and
`<name>.bitmask`, uint8 (rows, ceil(columns / 8)), 1 = kept, least significant bit first; see `sparsity/packing.py`. It
is packed in the orientation in which the model stores it, (out, in) for nn.Linear and (in, out) for Conv1D, so that a
reader needs no model; a tensor of more than two dimensions counts as a matrix with columns of its last one. What is
kept is whatever has a bit that is set, so every NaN comes back as it was, and so do negative zeros, unless they are
more than a sixteenth of a tensor: those are what `weight * mask` leaves of negative weights, no model knows them from
other zeros, and half of the zeros would have to be stored. All other tensors are plain safetensors. The files' name
keeps plain transformers from loading them: it would take the packed tensors for unknown ones and draw the weights at
random.

Three layers of CRC-32 make a damaged folder an error and not a wrong model:

* each file's metadata holds, under `peft_sparse`, JSON with the `version`, the `shapes` of the weights that it packs
  and the `crc32` of the bytes of every tensor in it;
* config.json's `peft_sparse` holds the CRC-32 of the header of each of those files, and of the bytes of the other
  files that a load reads, under `files`;
* and its own under `crc32`: of config.json as compact JSON with sorted keys, without this entry.

It also says `format`, `version`, `sparsity`, and under `modules` the pattern and the sparsity of each packed weight.
What is known about the model itself (`pruning`, `base_model`, `method`, see `storage/origin.py`) stays in the same
entry; a dense model's holds nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_sparse.sparsity import pack_mask, unpack_after_zero
from peft_sparse.storage.files import SafetensorsFile, crc32
from peft_sparse.storage.origin import CONFIG_KEY, facts_of

FORMAT, VERSION = "bitmask", 1
WEIGHTS_NAME = "sparse_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
VALUES, BITMASK = ".values", ".bitmask"

# The share of negative zeros above which they are stored as zeros.
NEGATIVE_ZEROS = 1 / 16

# What the second tensor costs in the header: its name, dtype, shape, place and checksum.
HEADER_BYTES = 256

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WAY_OUT = "save or download it again"


class Packed(NamedTuple):
    """A weight in two parts, and how many negative zeros became positive ones."""

    values: torch.Tensor
    bitmask: torch.Tensor
    turned: int = 0


def pack_weight(weight: torch.Tensor) -> Packed | None:
    """Pack a tensor; None if that is not smaller than the tensor itself.

    Examples:
        >>> weight = torch.zeros(64, 64)
        >>> weight[3, 8] = -0.0
        >>> values, bitmask, _ = pack_weight(weight)
        >>> values, bitmask.shape
        (tensor([-0.]), torch.Size([64, 8]))
    """
    if weight.dim() < 2 or not weight.is_floating_point() or not weight.numel():
        return None
    packed = pack_matrix(weight.detach().cpu().reshape(-1, weight.shape[-1]))
    return packed if packed.values.nbytes + packed.bitmask.nbytes + HEADER_BYTES < weight.nbytes else None


def pack_matrix(matrix: torch.Tensor) -> Packed:
    """Pack a matrix, whether that is smaller than it or not."""
    bits = matrix.detach().view(_BITS[matrix.element_size()])
    kept = bits != 0
    negative_zeros = kept & (matrix == 0)
    turned = int(negative_zeros.sum())
    if turned > NEGATIVE_ZEROS * matrix.numel():
        kept &= ~negative_zeros
    else:
        turned = 0
    bitmask = pack_mask(kept)
    return Packed(bits.masked_select(kept).view(matrix.dtype), bitmask, turned)


def unpack_weight(zero_first: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of [`pack_weight`], for parts that fit each other; a zero is before the values."""
    bits = zero_first.view(_BITS[zero_first.element_size()])
    return unpack_after_zero(bits, bitmask, shape[-1]).view(zero_first.dtype).view(shape)


def file_metadata(shapes: dict[str, list[int]], checksums: dict[str, str]) -> dict[str, str]:
    """The metadata of a `sparse_model*.safetensors`."""
    ours = {"version": VERSION, "shapes": shapes, "crc32": checksums}
    # One entry: safetensors writes several in random order, and the same model shall give the same bytes.
    return {CONFIG_KEY: json.dumps(ours, sort_keys=True)}


def read_metadata(file: SafetensorsFile) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(shapes of the packed weights, checksums of all tensors), as [`file_metadata`] wrote them.

    Raises:
        ValueError: if they do not fit the file's tensors.
    """
    try:
        ours = json.loads(file.metadata[CONFIG_KEY])
        check_version(ours["version"], str(file.path))
        shapes = {str(name): tuple(int(size) for size in shape) for name, shape in ours["shapes"].items()}
        checksums = dict(ours["crc32"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A packed file has the metadata of format v{VERSION} under {CONFIG_KEY!r}, got none that can be read in "
            f"{str(file.path)!r} ({error!r}); {_WAY_OUT}."
        ) from error
    for name, shape in shapes.items():
        missing = [name + part for part in (VALUES, BITMASK) if name + part not in file.header]
        if missing or len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"A packed weight has a shape, values and a bitmask, got `{name}` with shape {shape} and without "
                f"{missing or 'nothing'} in {str(file.path)!r}; {_WAY_OUT}."
            )
    without = sorted(file.header.keys() ^ checksums.keys())
    if without:
        raise ValueError(
            f"Every tensor of a packed file has a checksum and every checksum a tensor, got `{without[0]}` with only "
            f"one of them in {str(file.path)!r}; {_WAY_OUT}."
        )
    return shapes, checksums


def check_version(version: Any, where: str) -> None:
    """Raises:
    ValueError: unless files of this version can be read."""
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"This version of peft_sparse reads version {VERSION} of the packed format, got version {version!r} in "
            f"{where!r}; update peft_sparse, or save the model again."
        )


def config_crc32(config: dict[str, Any]) -> str:
    """The checksum of a config.json, its own entry left out."""
    ours = {name: value for name, value in config[CONFIG_KEY].items() if name != "crc32"}
    return crc32(json.dumps(config | {CONFIG_KEY: ours}, sort_keys=True, separators=(",", ":")).encode())


def says_packed(config: dict[str, Any]) -> bool:
    """Whether config.json is that of a packed folder, whole or damaged, and not of a dense model that was pruned."""
    entry = config.get(CONFIG_KEY, {})
    return not isinstance(entry, dict) or entry.keys() != facts_of(entry).keys()


def check_config(config: dict[str, Any], path: Path, verify: bool) -> dict[str, str]:
    """The checksums of the folder's files.

    Raises:
        ValueError: if the entry `peft_sparse` of config.json is not one of this format, or anything in config.json was
            changed.
    """
    ours = config[CONFIG_KEY]
    if not isinstance(ours, dict) or ours.get("format") != FORMAT or not isinstance(ours.get("files"), dict):
        raise ValueError(
            f"A packed folder's config.json says {CONFIG_KEY!r}: {{'format': {FORMAT!r}, 'version': {VERSION}, "
            f"'files': ...}}, got something else in {str(path)!r}; {_WAY_OUT}."
        )
    check_version(ours.get("version"), str(path))
    if verify and ours.get("crc32") != config_crc32(config):
        raise ValueError(
            f"config.json is as it was saved (CRC-32 {ours.get('crc32')}), got {config_crc32(config)} in "
            f"{str(path)!r}; {_WAY_OUT}, or pass `verify_checksums=False` if you changed it on purpose."
        )
    return ours["files"]
