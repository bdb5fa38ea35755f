"""A sparse matrix as the lists of its non-zeros: by row (CSR), and how to read the same lists by column.

Indices are int32, which is what the library behind torch's CPU matmul computes with; wider ones it converts at every
call. A non-zero takes 16 bytes in float32: value, column, row and place; 8 bytes without the lists by column, which a
forward alone does without.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from peft_sparse.sparsity.forms import PackedWeight, Weight, dense_weight
from peft_sparse.sparsity.packing import unpack_mask

# Places whose bits are looked at at a time when a weight is listed: bounds the temporaries, 25 bytes a place.
LISTED_AT_ONCE = 1 << 22


class CsrMatrix(NamedTuple):
    """The non-zeros of a matrix W (out, in).

    Attributes:
        row_starts: (out + 1,) int32; row i has the entries from row_starts[i] up to row_starts[i + 1].
        columns: (nnz,) int32, of each entry, in row-major order.
        values: (nnz,) of W's dtype.
        column_starts: (in + 1,) int32, the same of W^T.
        rows: (nnz,) int32, of each entry of W^T, in the row-major order of W^T.
        order: (nnz,) int32, where the entries of W^T are among those of W.
        shape: (out, in).
    """

    row_starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    column_starts: torch.Tensor
    rows: torch.Tensor
    order: torch.Tensor
    shape: tuple[int, int]

    def with_values(self, values: torch.Tensor) -> torch.Tensor:
        """A sparse CSR tensor (out, in) with these values in the places of W's."""
        return csr_from_lists(self.row_starts, self.columns, values, self.shape)

    def transposed_with_values(self, values: torch.Tensor) -> torch.Tensor:
        """The transpose (in, out) of [`CsrMatrix.with_values`], in CSR as well."""
        return csr_from_lists(self.column_starts, self.rows, values.index_select(0, self.order), self.shape[::-1])


def to_csr(weight: torch.Tensor) -> CsrMatrix:
    """The non-zeros of a matrix.

    Args:
        weight: W, (out, in), with fewer than 2^31 of them.

    Examples:
        >>> to_csr(torch.tensor([[0.0, 2.0], [3.0, 4.0]])).columns
        tensor([1, 0, 1], dtype=torch.int32)
    """
    out_features, in_features = weight.shape
    rows, columns = weight.nonzero(as_tuple=True)
    order = columns.argsort(stable=True)
    return CsrMatrix(
        row_starts=_starts(rows, out_features),
        columns=columns.int(),
        values=weight[rows, columns],
        column_starts=_starts(columns, in_features),
        rows=rows[order].int(),
        order=order.int(),
        shape=(out_features, in_features),
    )


def csr_tensor(weight: Weight) -> torch.Tensor:
    """The non-zeros of a matrix by row, as torch's own sparse tensor, for a forward: 8 bytes each in float32.

    Args:
        weight: W, (out, in), with fewer than 2^31 of them. A packed one shares its values with the result, which then
            has the 4 bytes of a column for each.

    Examples:
        >>> csr_tensor(torch.tensor([[0.0, 2.0], [3.0, 4.0]])).col_indices()
        tensor([1, 0, 1], dtype=torch.int32)
    """
    packed = weight if isinstance(weight, PackedWeight) else PackedWeight.of(dense_weight(weight).detach())
    step = max(1, LISTED_AT_ONCE // max(1, packed.in_features))
    columns = [
        unpack_mask(packed.bitmask[start : start + step], packed.in_features).nonzero()[:, 1].int()
        for start in range(0, packed.shape[0], step)
    ]
    listed = torch.cat(columns) if columns else packed.bitmask.new_empty(0, dtype=torch.int32)
    return csr_from_lists(packed.starts.int(), listed, packed.values.detach(), tuple(packed.shape))


def _starts(indices: torch.Tensor, length: int) -> torch.Tensor:
    counts = torch.bincount(indices, minlength=length)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def csr_from_lists(
    row_starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """torch's own sparse tensor of these lists, which it shares."""
    with warnings.catch_warnings():  # torch announces at the first one that they are in beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        return torch.sparse_csr_tensor(
            row_starts, columns, values, shape, device=values.device, check_invariants=False
        )
