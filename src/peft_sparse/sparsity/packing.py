"""Masks as bits, and the entries of a weight without its zeros.

A mask takes one bit a weight, rows padded to whole bytes, least significant bit first: bit b of byte j of a row
belongs to column 8 j + b, which is NumPy's `packbits(..., bitorder="little")`. A weight is packed into that mask and
the entries that it keeps, row by row, so that n of N weights in a dtype of d bytes take n d + N / 8 bytes.

Unpacking is the one of the two that has to be fast: on a CPU the kernels of `peft_sparse.native` do it where there are
some. Everywhere else, the k-th kept place gets the k-th value: a running count over the bytes and a table of the ranks
inside a byte say which value a place gets, and the places without one get a zero that is put before the values. So it
is two table look-ups, a cumulative sum and a gather, without a branch, which is faster than `masked_scatter_`, whose
branch for each bit no processor predicts.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from peft_sparse._graphs import leaves_python, values_unknown
from peft_sparse.native import native_nonzeros, native_pack, native_row_starts, native_takes, native_unpack

# Multiplying the eight 0/1 bytes of a little-endian word by this gathers them, in order, in its top byte.
_GATHER_BYTES = 0x0102040810204080

# Places that are unpacked at a time: the temporaries, an int32 a place, stay in a core's cache. A GPU wants few and
# large kernels.
UNPACKED_AT_ONCE = 1 << 18
UNPACKED_AT_ONCE_GPU = 1 << 22


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into bits.

    Args:
        mask: bool (out, in).

    Returns:
        uint8 (out, ceil(in / 8)).

    Examples:
        >>> pack_mask(torch.tensor([[True, False, False, True, False, False, False, False, True]]))
        tensor([[9, 1]], dtype=torch.uint8)
    """
    padded = F.pad(mask, (0, -mask.shape[1] % 8))
    if leaves_python():  # ONNX knows no view as another dtype
        return (padded.unflatten(1, (-1, 8)).long() * _bits(mask.device).long()).sum(-1).to(torch.uint8)
    words = padded.contiguous().view(torch.int64)
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
    if values_unknown(packed) or leaves_python():  # no table is kept; a compiler fuses this with what follows
        unpacked = torch.bitwise_and(packed[..., None], _bits(packed.device)) != 0
        return unpacked.flatten(1)[:, :in_features].to(dtype)
    table, whole = _byte_table(dtype, packed.device), out if in_features % 8 == 0 else None
    unpacked = torch.index_select(table, 0, packed.reshape(-1).int(), out=None if whole is None else whole.view(-1, 8))
    return unpacked.view(packed.shape[0], 8 * packed.shape[1])[:, :in_features]


def _bits(device: torch.device) -> torch.Tensor:
    """(8,): the bits of a byte."""
    return (2 ** torch.arange(8, device=device)).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _byte_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 8): the bits of every byte. One look-up a byte is several times faster than shifting bits out."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit) & 1).to(dtype)


def pack_nonzeros(weight: torch.Tensor) -> torch.Tensor:
    """[`pack_mask`] of `weight != 0`, of (out, in). A negative zero is a zero."""
    if weight.is_floating_point() and native_takes(weight, weight):
        return native_nonzeros(weight)
    return pack_mask(weight != 0)


def pack_values(weight: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """The entries of a weight at the places of a mask.

    Args:
        weight: (out, in).
        bitmask: uint8 (out, ceil(in / 8)), see [`pack_mask`].

    Returns:
        (nnz,), in row-major order.

    Examples:
        >>> weight = torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, 3.0]])
        >>> pack_values(weight, pack_mask(weight != 0))
        tensor([1.5000, 2.0000, 3.0000])
    """
    if native_takes(bitmask, weight):
        return native_pack(weight, bitmask)
    return weight.masked_select(unpack_mask(bitmask, weight.shape[1]))


def unpack_values(
    values: torch.Tensor, bitmask: torch.Tensor, in_features: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The inverse of [`pack_values`]: zero wherever the mask is 0, whatever the values are, NaN and infinity included.

    Any block of rows unpacks alone, given its own values.

    Args:
        values: (nnz,), in row-major order.
        bitmask: uint8 (out, ceil(in / 8)) with nnz bits set.
        in_features: columns of the weight.
        out: contiguous (out, in) of the dtype of `values`, to write into; None: a new tensor. Not differentiable
            where it is given.

    Returns:
        (out, in).

    Examples:
        >>> unpack_values(torch.tensor([1.5, 2.0, 3.0]), torch.tensor([[2], [5]], dtype=torch.uint8), in_features=3)
        tensor([[0.0000, 1.5000, 0.0000],
                [2.0000, 0.0000, 3.0000]])
    """
    if native_takes(bitmask, values):
        return native_unpack(values, bitmask, in_features, out)
    return unpack_after_zero(torch.cat([values.new_zeros(1), values]), bitmask, in_features, out)


def unpack_after_zero(
    zero_first: torch.Tensor, bitmask: torch.Tensor, in_features: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[`unpack_values`] of values that have a zero before them, (1 + nnz,), which spares a copy of them."""
    if native_takes(bitmask, zero_first):
        return native_unpack(zero_first[1:], bitmask, in_features, out)
    if values_unknown(bitmask):  # a compiler fuses these
        bits = unpack_mask(bitmask, in_features, torch.int64)
        return zero_first[bits.flatten().cumsum(0).view_as(bits) * bits]
    index_of = _Places(zero_first.numel(), bitmask.device)
    if out is None and zero_first.requires_grad and torch.is_grad_enabled():
        return zero_first[index_of(bitmask)[:, :in_features].long()]
    rows, columns = bitmask.shape[0], bitmask.shape[1] * 8
    out = zero_first.new_empty(rows, in_features) if out is None else out
    at_once = UNPACKED_AT_ONCE if zero_first.device.type == "cpu" else UNPACKED_AT_ONCE_GPU
    step = max(1, at_once // max(1, columns))
    for start in range(0, rows, step):
        index = index_of(bitmask[start : start + step])[:, :in_features].reshape(-1)
        torch.index_select(zero_first, 0, index, out=out[start : start + step].view(-1))
    return out


class _Places:
    """Called with block after block of a bitmask's rows, uint8 (rows, bytes), tells for each place, (rows, 8 bytes),
    which value it gets, counted from 1; 0 where the mask is 0. One block's memory is the next one's, so that
    the system is not asked for more.

    Args:
        values: how many there are; int32 counts up to 2^31 of them, int64 more.
    """

    def __init__(self, values: int, device: torch.device) -> None:
        self.ranks = _byte_ranks(torch.int32 if values < 2**31 else torch.int64, device)
        self.codes = torch.empty(0, dtype=torch.int32, device=device)
        self.counts = torch.empty(0, dtype=torch.int32, device=device)
        self.ends = torch.empty(0, dtype=self.ranks.dtype, device=device)
        self.index = torch.empty(0, dtype=self.ranks.dtype, device=device)
        self.before: torch.Tensor | int = 0  # values in the blocks so far

    def __call__(self, bitmask: torch.Tensor) -> torch.Tensor:
        codes = self.codes.resize_(bitmask.numel()).copy_(bitmask.reshape(-1))
        counts = torch.index_select(_popcounts(codes.device), 0, codes, out=self.counts.resize_(codes.numel()))
        ends = torch.cumsum(counts, 0, dtype=self.ranks.dtype, out=self.ends.resize_(codes.numel()))
        ends += self.before
        self.before = ends[-1:].clone()
        index = torch.index_select(self.ranks, 0, codes, out=self.index.resize_(codes.numel(), 8))
        index.add_(ends.sub_(counts)[:, None]).clamp_(min=0)
        return index.view(bitmask.shape[0], 8 * bitmask.shape[1])


@functools.lru_cache(maxsize=16)
def _byte_ranks(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 8): which of a byte's set bits each of them is, counted from 1; where a bit is not set, so low a number
    that it stays negative whatever count is added."""
    bits = _byte_table(dtype, torch.device("cpu"))
    return torch.where(bits.bool(), bits.cumsum(1, dtype=dtype), torch.iinfo(dtype).min).to(device)


def row_starts(bitmask: torch.Tensor) -> torch.Tensor:
    """Where each row begins among the values, and where the last one ends: integer (out + 1,), on the CPU.

    Examples:
        >>> row_starts(torch.tensor([[2], [5]], dtype=torch.uint8))
        tensor([0, 1, 3], dtype=torch.int32)
    """
    if values_unknown(bitmask):
        return F.pad(unpack_mask(bitmask, 8 * bitmask.shape[1], torch.int64).sum(1).cumsum(0), (1, 0))
    if native_takes(bitmask):
        ends = native_row_starts(bitmask)
    else:
        counts = _popcounts(bitmask.device).index_select(0, bitmask.reshape(-1).int()).view(bitmask.shape).sum(1)
        ends = F.pad(counts.cumsum(0), (1, 0)).cpu()
    return ends.int() if int(ends[-1]) < 2**31 else ends  # half the memory, and it is kept for each layer


def packed_fault(values: torch.Tensor, bitmask: torch.Tensor, rows: int, columns: int) -> str | None:
    """What keeps two tensors from being the values and the bitmask of a weight (rows, columns); None: nothing.

    Examples:
        >>> packed_fault(torch.ones(2), torch.tensor([[2], [5]], dtype=torch.uint8), rows=2, columns=3)
        'each bit of its bitmask that is set has a value, got 3 bits and 2 values'
    """
    expected = (rows, (columns + 7) // 8)
    if tuple(bitmask.shape) != expected or bitmask.dtype != torch.uint8:
        return f"its bitmask is uint8 {expected}, got {str(bitmask.dtype)[6:]} {tuple(bitmask.shape)}"
    bits = int(row_starts(bitmask)[-1])
    if bits != values.numel():
        return f"each bit of its bitmask that is set has a value, got {bits} bits and {values.numel()} values"
    if columns % 8 and bool((bitmask[:, -1] >> (columns % 8)).any()):
        return f"the bits after its last column ({columns}) are 0, got some that are set"
    return None


@functools.lru_cache(maxsize=16)
def _popcounts(device: torch.device) -> torch.Tensor:
    return _byte_table(torch.uint8, torch.device("cpu")).sum(1, dtype=torch.int32).to(device)
