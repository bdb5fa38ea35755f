"""Masks as bits: one bit a weight, rows padded to whole bytes, least significant bit first.

Bit b of byte j of a row belongs to column 8 j + b, which is NumPy's `packbits(..., bitorder="little")`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

# Multiplying the eight 0/1 bytes of a little-endian word by this gathers them, in order, in its top byte.
_GATHER_BYTES = 0x0102040810204080


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into bits.

    Args:
        mask: bool (out, in).

    Returns:
        uint8 (out, ceil(in / 8)).

    Example:
        >>> pack_mask(torch.tensor([[True, False, False, True, False, False, False, False, True]]))
        tensor([[9, 1]], dtype=torch.uint8)
    """
    words = F.pad(mask, (0, -mask.shape[1] % 8)).contiguous().view(torch.int64)
    return (words.mul(_GATHER_BYTES) >> 56).to(torch.uint8)  # the shift keeps the sign, and the cast drops it


def unpack_mask(
    packed: torch.Tensor, in_features: int, dtype: torch.dtype = torch.bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The inverse of [`pack_mask`].

    Args:
        packed: uint8 (out, ceil(in / 8)).
        in_features: columns of the mask.
        dtype: of the result; a floating one gives 0 and 1, ready to multiply a weight with.
        out: contiguous memory for the result, which is used if rows of the mask are whole bytes; None: new memory.

    Returns:
        (out, in).
    """
    if torch.compiler.is_compiling():  # a compiler fuses the shifts with what follows
        bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
        unpacked = (packed[..., None] >> bits) & 1
        return unpacked.flatten(1)[:, :in_features].to(dtype)
    table, whole = _byte_table(dtype, packed.device), out if in_features % 8 == 0 else None
    unpacked = torch.index_select(table, 0, packed.reshape(-1).int(), out=None if whole is None else whole.view(-1, 8))
    return unpacked.view(packed.shape[0], -1)[:, :in_features]


@functools.lru_cache(maxsize=16)
def _byte_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 8): the bits of every byte. One look-up a byte is several times faster than shifting bits out."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(device=device, dtype=dtype)
