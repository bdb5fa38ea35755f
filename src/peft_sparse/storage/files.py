"""One safetensors file, read tensor by tensor, and CRC-32 checksums.

Tensors are read into memory of their own and not mapped: whoever looks at a mapped file that something else cuts short
is killed by the system, with no error to catch.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# The names that safetensors gives to dtypes.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def crc32(data: bytes | memoryview | torch.Tensor) -> str:
    """CRC-32 (zlib's) of bytes, or of a tensor's in row-major order, as 8 hexadecimal digits.

    Examples:
        >>> crc32(b"123456789"), crc32(torch.tensor([1.0, 2.0]))
        ('cbf43926', '2e3fa576')
    """
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data  # no copy
    return f"{zlib.crc32(data):08x}"


def _cut_off(path: Path) -> str:
    """For a message: the first tensor that a file which is too short does not have in full."""
    if not path.is_file():
        return ""
    _, text = _head(path)
    try:
        ends = {key: entry["data_offsets"][1] for key, entry in json.loads(text).items() if key != "__metadata__"}
        lost = [key for key, end in ends.items() if 8 + len(text) + end > path.stat().st_size]
    except (ValueError, TypeError, LookupError, AttributeError):  # no header either
        return ""
    return f" (`{min(lost, key=lambda key: ends[key])}` is not there in full)" if lost else ""


def _head(path: Path) -> tuple[bytes, bytes]:
    """The first 8 bytes of a file, which say how long its header is, and the header, or what there is of it."""
    with path.open("rb") as file:
        size = file.read(8)
        return size, file.read(min(int.from_bytes(size, "little"), path.stat().st_size))


class SafetensorsFile:
    """A file of tensors, its header read and checked.

    Args:
        path: of the file.

    Attributes:
        metadata: the strings that were saved with it.
        header: dtype (safetensors' word for it), shape and data_offsets of each tensor.

    Raises:
        ValueError: if it is not there, or no safetensors file, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt"):  # checks the header and the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"A shard is a whole safetensors file, got {str(path)!r}, which cannot be read ({error}); it is "
                f"missing, damaged or cut short{_cut_off(path)}: save or download it again."
            ) from error
        size, text = _head(path)
        self.header_crc32 = crc32(size + text)
        self.header: dict[str, dict[str, Any]] = json.loads(text)
        self.metadata: dict[str, str] = self.header.pop("__metadata__", None) or {}
        self._data_start = 8 + len(text)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self.header[key]["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor, from the header.

        Raises:
            ValueError: for one that is not known here."""
        name = self.header[key]["dtype"]
        if name not in DTYPES:
            raise ValueError(
                f"A tensor has one of the dtypes {', '.join(DTYPES)}, got {name} in `{key}` of {str(self.path)!r}; "
                "save it in another dtype."
            )
        return DTYPES[name]

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor, from the header."""
        begin, end = self.header[key]["data_offsets"]
        return end - begin

    def read(self, key: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of a tensor.

        Args:
            into: uint8 (nbytes,), where to read it to; None: new memory.

        Raises:
            ValueError: if the file ends before it does."""
        begin, end = self.header[key]["data_offsets"]
        raw = torch.empty(end - begin, dtype=torch.uint8, device="cpu") if into is None else into
        left = raw.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data_start + begin)
            while left:
                done = file.readinto(left)  # at most 2 GiB at a time
                if not done:
                    raise ValueError(f"{str(self.path)!r} ends in the middle of `{key}`; save or download it again.")
                left = left[done:]
        return raw.view(self.dtype(key)).view(self.shape(key))
