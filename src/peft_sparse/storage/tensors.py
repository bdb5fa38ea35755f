"""A tensor on disk that is read when it is needed: as it lies there, or packed as values and bitmask.

The old sparse layouts of compressed-tensors (up to 0.14, removed in 0.15) hold the same two things for the weight of
a module: `<module>.compressed`, the values in row-major order, and `<module>.bitmask`, with our order of bits; beside
them `<module>.shape`, and in `sparse-bitmask` `<module>.row_offsets`, which follow from the bitmask. In
`sparse-24-bitmask` two of every four weights are kept even if they are zero, and shape and values have two dimensions.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peft_sparse.sparsity import packed_fault
from peft_sparse.storage.files import SafetensorsFile, crc32
from peft_sparse.storage.format import BITMASK, VALUES, read_metadata, unpack_weight

LEGACY_PARTS = (".compressed", ".bitmask", ".shape")
ROW_OFFSETS = ".row_offsets"
LARGEST_SCRATCH = 32 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """A tensor of a file, and the CRC-32 that it should have; None: it is not looked at."""

    file: SafetensorsFile
    key: str
    crc32: str | None = None

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in memory of its own or in `into`, see [`SafetensorsFile.read`].

        Raises:
            ValueError: if it is not what was saved."""
        tensor = self.file.read(self.key, into)
        if self.crc32 is not None and crc32(tensor) != self.crc32:
            raise ValueError(
                f"`{self.key}` is damaged: its CRC-32 is {self.crc32}, got {crc32(tensor)} from "
                f"{str(self.file.path)!r}; save or download it again."
            )
        return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model on disk. Indexing reads it, which is all that transformers wants of a lazy state dict.

    Attributes:
        name: its key in the model's dense state dict.
        shape, dtype: of the dense tensor.
        data: the tensor, or the values if it is packed.
        bitmask: None for one that is not packed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Part
    bitmask: Part | None = None

    @property
    def nbytes(self) -> int:
        """Of the dense tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self) -> torch.Tensor:
        """The dense tensor.

        Raises:
            ValueError: that names it, if it is damaged."""
        if self.bitmask is None:
            return self.data.read()
        size = self.dtype.itemsize
        raw = _scratch("values", size + self.data.file.nbytes(self.data.key))  # one more, for a zero before them
        raw[:size] = 0
        values = self.data.read(raw[size:])
        bitmask = self.bitmask.read(_scratch("bitmask", self.bitmask.file.nbytes(self.bitmask.key)))
        self._check(values, bitmask)
        return unpack_weight(raw.view(values.dtype), bitmask, self.shape)

    def read_packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and bitmask of one that is packed, checked against each other.

        Raises:
            ValueError: as `read` does."""
        assert self.bitmask is not None, f"{self.name} is not packed"
        values, bitmask = self.data.read(), self.bitmask.read()
        self._check(values, bitmask)
        return values, bitmask

    def _check(self, values: torch.Tensor, bitmask: torch.Tensor) -> None:
        rows, columns = torch.Size(self.shape[:-1]).numel(), self.shape[-1]
        fault = packed_fault(values, bitmask, rows, columns)
        if fault:
            raise ValueError(
                f"`{self.name}` is damaged: {fault}, in {str(self.data.file.path)!r}; save or download it again."
            )


_memory = threading.local()


def _scratch(name: str, nbytes: int) -> torch.Tensor:
    """Memory for one part of a packed tensor, uint8 (nbytes,), good until this thread asks for it again: a load frees
    nothing between the weights that it makes, which would leave holes that take as much room as the parts did."""
    if nbytes > LARGEST_SCRATCH:  # goes back to the system when it is freed, and leaves no hole
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    buffer = getattr(_memory, name, None)
    if buffer is None or buffer.numel() < nbytes:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        setattr(_memory, name, buffer)
    return buffer[:nbytes]


def plain_tensors(files: list[SafetensorsFile]) -> dict[str, StoredTensor]:
    """All tensors of plain files by name."""
    return {key: _plain(file, key) for file in files for key in file.header}


def packed_tensors(files: list[SafetensorsFile], verify: bool) -> dict[str, StoredTensor]:
    """All tensors of files in packed format v1 by name.

    Args:
        verify: look at the checksums.

    Raises:
        ValueError: if a file's metadata does not fit its tensors.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        shapes, checksums = read_metadata(file)
        checks: Mapping[str, str] = checksums if verify else {}
        for name, shape in shapes.items():
            data, bitmask = (Part(file, name + part, checks.get(name + part)) for part in (VALUES, BITMASK))
            found[name] = StoredTensor(name, shape, file.dtype(data.key), data, bitmask)
        parts = {name + part for name in shapes for part in (VALUES, BITMASK)}
        found.update({key: _plain(file, key, checks.get(key)) for key in file.header if key not in parts})
    return found


def is_legacy(files: list[SafetensorsFile]) -> bool:
    """Whether any weight in these files is in a sparse layout of compressed-tensors."""
    keys = {key for file in files for key in file.header}
    return any(_modules_in(keys))


def legacy_tensors(files: list[SafetensorsFile]) -> dict[str, StoredTensor]:
    """All tensors of files that compressed-tensors wrote with `sparse-bitmask` or `sparse-24-bitmask`, by name.

    Raises:
        ValueError: if one has a shape that no weight has.
    """
    where = {key: file for file in files for key in file.header}
    found: dict[str, StoredTensor] = {}
    parts: set[str] = set()
    for module in _modules_in(where.keys()):
        keys = [module + part for part in LEGACY_PARTS]
        data, bitmask, shape = (Part(where[key], key) for key in keys)
        dense_shape = tuple(int(size) for size in shape.read().reshape(-1))
        name = f"{module}.weight"
        if len(dense_shape) < 2 or min(dense_shape) < 1:
            raise ValueError(
                f"`{name}` is damaged: a packed weight has two dimensions or more, got the shape {dense_shape}, "
                f"in {str(shape.file.path)!r}; save or download it again."
            )
        found[name] = StoredTensor(name, dense_shape, data.file.dtype(data.key), data, bitmask)
        parts.update(keys, [module + ROW_OFFSETS])
    return found | {key: _plain(file, key) for key, file in where.items() if key not in parts}


def _modules_in(keys: Any) -> list[str]:
    modules = (key.removesuffix(LEGACY_PARTS[0]) for key in keys if key.endswith(LEGACY_PARTS[0]))
    return [module for module in modules if all(module + part in keys for part in LEGACY_PARTS)]


def _plain(file: SafetensorsFile, key: str, checksum: str | None = None) -> StoredTensor:
    return StoredTensor(key, file.shape(key), file.dtype(key), Part(file, key, checksum))
