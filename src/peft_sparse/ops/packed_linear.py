"""The linear of a packed or quantised weight: Y = X W^T + b, with W unpacked block of rows by block.

With G = dY^T X:  dX = dY W;  the gradient of packed values is G at the places of the mask. Codes have none.

W is unpacked once in the forward and once in the backward, and no tensor of its size lives longer than a block. The
plain twin is `packed_linear` in `peft_sparse.ops.reference`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from peft_sparse.ops import reference
from peft_sparse.ops.blocks import (
    Buffers,
    add_product,
    autocast_off,
    linear_by_blocks,
    matmul_dtype,
    row_blocks,
    weight_rows,
)
from peft_sparse.ops.derivatives import first_only
from peft_sparse.sparsity import Weight, put_together, take_apart, write_rows


def packed_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.packed_linear`]: same arguments, same results."""
    if reference.reference_in_use() or isinstance(weight, torch.Tensor):
        return reference.packed_linear(x, weight, bias)
    dtype, (entries, rest) = matmul_dtype(x), take_apart(weight)
    return _PackedLinear.apply(x.to(dtype), entries, None if bias is None else bias.to(dtype), *rest)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        entries: torch.Tensor,  # (nnz,), or the codes of a quantised weight
        bias: torch.Tensor | None,  # (out,)
        *rest: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), entries)
        ctx.rest, ctx.x_shape = rest, x.shape
        weight = put_together(entries, rest)
        buffers = Buffers(x)

        def build(rows: slice) -> torch.Tensor:
            return weight_rows(weight, rows, buffers).to(x.dtype)

        blocks = ((rows, partial(build, rows)) for rows in row_blocks(x, *weight.shape))
        return linear_by_blocks(x, bias, weight.shape[0], blocks)

    @staticmethod
    @first_only
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, entries = ctx.saved_tensors
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        weight = put_together(entries, ctx.rest)
        dy = dy.reshape(-1, dy.shape[-1])
        dx, buffers = None, Buffers(dy)
        dvalues = torch.empty_like(entries) if needs_values else None
        with autocast_off(dy):
            for rows in row_blocks(dy, *weight.shape):
                if needs_x:
                    dx = add_product(dx, dy[:, rows], weight_rows(weight, rows, buffers).to(dy.dtype))
                if dvalues is not None:
                    G = dy[:, rows].T @ x.reshape(-1, x.shape[-1])  # (rows, in)
                    write_rows(dvalues, weight, rows, G)
        dbias = dy.sum(0) if needs_bias else None
        return None if dx is None else dx.view(ctx.x_shape), dvalues, dbias, *[None] * len(ctx.rest)
