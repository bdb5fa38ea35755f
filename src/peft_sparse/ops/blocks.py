"""What the fused ops share: blocks that bound their temporaries, and the dtype of their matmuls.

The effective weight of a layer is rebuilt block by block where it is needed, and never kept. A block bounds the memory
for it, and is large enough for a matmul to run at full speed; all blocks of a pass share their buffers, since new
memory costs a CPU more than the arithmetic in it. Elsewhere than in CPU float32 blocks are larger: a GPU wants few and
large kernels, and half precision rounds once more for each block that adds to a gradient. A compiler gets the weight
as one block, since it fuses the building itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from peft_sparse.sparsity import Weight

BLOCK_ELEMENTS = 1 << 21
LARGE_BLOCK_ELEMENTS = 1 << 24
MIN_ROWS = 64  # below, a matmul no longer runs at full speed


def block_rows(x: torch.Tensor, in_features: int) -> int:
    """Rows in a block of a weight of `in_features` columns that is multiplied with `x`."""
    small = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return max(MIN_ROWS, (BLOCK_ELEMENTS if small else LARGE_BLOCK_ELEMENTS) // max(1, in_features))


def row_blocks(x: torch.Tensor, out_features: int, in_features: int) -> Iterator[slice]:
    """Consecutive slices of rows that cover a weight of shape (out, in)."""
    step = out_features if torch.compiler.is_compiling() else block_rows(x, in_features)
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def group_blocks(
    x: torch.Tensor, out_features: int, in_features: int, num_groups: int
) -> Iterator[tuple[slice, slice, int]]:
    """Consecutive (groups, rows, rows per group) that cover a weight with `num_groups` contiguous groups of rows.

    A block is some whole groups of equal size, so that its weight can be viewed as (groups, rows per group, in), or a
    part of one group. The first `out_features % num_groups` groups are one row longer than the others.
    """
    most = out_features if torch.compiler.is_compiling() else block_rows(x, in_features)
    size, longer = divmod(out_features, num_groups)
    for first, last, rows in ((0, longer, size + 1), (longer, num_groups, size)):
        step = max(1, most // max(1, rows))
        for start in range(first, last, step):
            stop = min(start + step, last)
            offset = start * size + min(start, longer)
            if rows <= most:
                yield slice(start, stop), slice(offset, offset + (stop - start) * rows), rows
                continue
            for part in range(0, rows, most):
                length = min(most, rows - part)
                yield slice(start, stop), slice(offset + part, offset + part + length), length


class Buffers:
    """Memory for the temporaries of one pass, by name, which its blocks take turns to fill.

    None of it where a compiler or a GPU's allocator reuses memory itself.

    Args:
        x: what the pass computes on.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._like = x if x.device.type == "cpu" and not torch.compiler.is_compiling() else None
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """What to pass as `out`: a contiguous tensor with any content, good until the name is asked for again."""
        if self._like is None:
            return None
        numel = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name, dtype] = self._like.new_empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)


def weight_rows(weight: Weight, rows: slice, buffers: Buffers) -> torch.Tensor:
    """Some consecutive rows of a weight, (rows, in): a view of a dense one; those of a packed or quantised one are
    unpacked, into a buffer of their own."""
    if isinstance(weight, torch.Tensor):
        return weight[rows]
    return weight.rows(rows, buffers.get("unpacked", (rows.stop - rows.start, weight.shape[1]), weight.dtype))


def outer_product(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """G = dY^T X, multiplied in the dtype of `x` and then of `dtype`; in `out` if that needs no conversion."""
    return torch.mm(dy.T, x, out=out) if x.dtype == dtype else (dy.T @ x).to(dtype)


def linear_by_blocks(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    blocks: Iterable[tuple[slice, Callable[[], torch.Tensor]]],
) -> torch.Tensor:
    """X W^T + b of a weight that is built block by block.

    Args:
        x: (..., in).
        bias: (out,) or None, of the dtype of `x`.
        blocks: slices of rows that cover the weight, each with a function that builds them, (rows, in).

    Returns:
        (..., out). Not a view: some models edit a linear's output in place, which autograd refuses on a view.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, torch.cat([build() for _, build in blocks]), bias)
    y = x.new_empty(*x.shape[:-1], out_features)
    for rows, build in blocks:
        into = y.view(-1, out_features)[:, rows]
        if bias is None:
            torch.mm(tokens, build().T, out=into)
        else:
            torch.addmm(bias[rows], tokens, build().T, out=into)
    return y


def add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total` plus left times right, in place; the product alone for the first block, whose `total` is None.

    Not `addmm_(beta=0)` into empty memory: compiled for a GPU, that is 0 times what lies there, NaNs included.
    """
    return left @ right if total is None else total.addmm_(left, right)


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear of `x` is computed: autocast's where it is on, else that of `x`."""
    device_type = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def autocast_off(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context without autocast: a backward may be called inside of one, but chooses its dtypes itself. On the meta
    device there is none, and torch refuses to be asked."""
    return nullcontext() if x.is_meta else torch.autocast(device_type=x.device.type, enabled=False)
