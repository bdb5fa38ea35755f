"""A weight in any of its forms: dense, packed, or quantised, of which any rows can be had as a tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from peft_sparse._graphs import values_unknown
from peft_sparse.sparsity.packing import pack_nonzeros, pack_values, row_starts, unpack_values
from peft_sparse.sparsity.quantized import EightBitWeight, FourBitWeight, QuantizedWeight


class PackedWeight(NamedTuple):
    """A weight (out, in) without its zeros, of which any rows can be had as a tensor.

    Attributes:
        values: (nnz,), the entries that are kept, in row-major order.
        bitmask: uint8 (out, ceil(in / 8)), see [`pack_mask`]; 1 = kept.
        in_features: columns of the weight.
        starts: see [`row_starts`].

    Examples:
        >>> packed = PackedWeight.of(torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, 3.0]]))
        >>> packed.values
        tensor([1.5000, 2.0000, 3.0000])
        >>> packed.rows(slice(1, 2))
        tensor([[2., 0., 3.]])
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    in_features: int
    starts: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedWeight:
        """Pack (out, in): all entries but zeros. A negative zero comes back as a positive one."""
        bitmask = pack_nonzeros(weight)
        return cls(pack_values(weight, bitmask), bitmask, weight.shape[1], row_starts(bitmask))

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((self.bitmask.shape[0], self.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def span(self, rows: slice) -> slice:
        """Where the values of some consecutive rows lie in `values`."""
        start, stop, _ = rows.indices(self.bitmask.shape[0])
        return slice(int(self.starts[start]), int(self.starts[stop]))

    def rows(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Some consecutive rows, (rows, in), a new tensor or in `out`, see [`unpack_values`]."""
        if values_unknown(self.bitmask):  # in one block, see ops/blocks.py: where a row begins cannot be told
            return unpack_values(self.values, self.bitmask, self.in_features)[rows]
        return unpack_values(self.values[self.span(rows)], self.bitmask[rows], self.in_features, out)

    def dense(self) -> torch.Tensor:
        """All of it, (out, in), a new tensor."""
        return unpack_values(self.values, self.bitmask, self.in_features)


Weight = torch.Tensor | PackedWeight | QuantizedWeight
_FORMS = {form.__name__: form for form in (PackedWeight, FourBitWeight, EightBitWeight)}


def take_apart(weight: Weight) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """The tensor of a weight's entries (of a quantised one, their codes), which autograd is to know, and the rest of
    it: empty for a dense weight."""
    if isinstance(weight, torch.Tensor):
        return weight, ()
    entries, *rest = weight  # the compiler of torch 2.6 cannot slice a named tuple
    return entries, (type(weight).__name__, *rest)


def put_together(entries: torch.Tensor, rest: tuple[Any, ...]) -> Weight:
    """The inverse of [`take_apart`]."""
    return _FORMS[rest[0]](entries, *rest[1:]) if rest else entries


def write_rows(entries: torch.Tensor, weight: Weight, rows: slice, block: torch.Tensor) -> None:
    """Write some consecutive rows of another weight, (rows, in), into entries of the form of [`weight_entries`]."""
    if isinstance(weight, PackedWeight):
        entries[weight.span(rows)] = pack_values(block, weight.bitmask[rows])
    else:
        entries[rows] = block


def weight_entries(weight: Weight) -> torch.Tensor:
    """The entries of a weight: the values of a packed one, else (out, in); of a quantised one a new float32 tensor."""
    return weight.values if isinstance(weight, PackedWeight) else dense_weight(weight)


def with_entries(weight: Weight, entries: torch.Tensor) -> Weight:
    """The weight that has other entries at the same places; the inverse of [`weight_entries`]. Not quantised."""
    return weight._replace(values=entries) if isinstance(weight, PackedWeight) else entries


def dense_weight(weight: Weight) -> torch.Tensor:
    """A weight as (out, in); one that is packed or quantised as a new tensor."""
    return weight if isinstance(weight, torch.Tensor) else weight.dense()
