"""SPP's linear, fused: Y = X W_eff^T + b with W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]) (arXiv 2405.16057).

With G = dY^T X and H = G * W:

    dX = dY W_eff;    dA[g] = s sum over i in g of B[i] H[i];    dB[i] = s <H[i], A[g(i)]>.

Only X is saved. W_eff is rebuilt in the backward, block of rows by block, so that no tensor of the weight's size lives
longer than its block. A packed W is unpacked in the same blocks; its values get their gradient at the places of the
mask. A quantised W is frozen, and dequantised in the same blocks in forward and backward. The plain twins are
`spp_linear` and `spp_linear_update` in `peft_sparse.ops.reference`; where [`peft_sparse.ops.use_triton`] is on, layers
on a GPU are computed by `peft_sparse.ops.triton_spp`.
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
    group_blocks,
    linear_by_blocks,
    matmul_dtype,
    outer_product,
    weight_rows,
)
from peft_sparse.ops.derivatives import first_only
from peft_sparse.ops.spp_block import factor_gradients, scaled_rows
from peft_sparse.ops.triton_switch import triton_takes_spp
from peft_sparse.sparsity import Weight, put_together, take_apart, write_rows
from peft_sparse.sparsity.importance import score_dtype


def spp_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.spp_linear`]: same arguments, same results."""
    if reference.reference_in_use():
        return reference.spp_linear(x, weight, bias, A, B, scaling)
    dtype = matmul_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    entries, rest = take_apart(weight)
    return _SppLinear.apply(x.to(dtype), entries, bias, A, B, scaling, 1.0, *rest)


def spp_linear_update(
    x: torch.Tensor, weight: Weight, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.spp_linear_update`]: the same function as `spp_linear`, without
    the 1 in W (1 + s B A)."""
    if reference.reference_in_use():
        return reference.spp_linear_update(x, weight, A, B, scaling)
    entries, rest = take_apart(weight)
    return _SppLinear.apply(x.to(matmul_dtype(x)), entries, None, A, B, scaling, 0.0, *rest)


class _SppLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        entries: torch.Tensor,  # (out, in), the values of a packed weight or the codes of a quantised one
        bias: torch.Tensor | None,  # (out,)
        A: torch.Tensor,  # (r, in)
        B: torch.Tensor,  # (out,)
        scaling: float,
        offset: float,
        *rest: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, entries, A, B)
        ctx.scaling, ctx.offset, ctx.rest = scaling, offset, rest
        weight = put_together(entries, rest)
        ctx.by_triton = triton_takes_spp(x, weight, A, B)
        if ctx.by_triton:
            from peft_sparse.ops import triton_spp  # needs triton

            return triton_spp.forward(x, weight, bias, A, B, scaling, offset)
        factor_dtype, buffers = score_dtype(weight.dtype), Buffers(x)
        A, B = A.to(factor_dtype), B.to(factor_dtype)

        def build(groups: slice, rows: slice, size: int) -> torch.Tensor:
            block = weight_rows(weight, rows, buffers)
            out = buffers.get("W", block.shape, factor_dtype)
            return scaled_rows(block, A[groups], B[rows], size, scaling, offset, x.dtype, out)

        blocks = (
            (rows, partial(build, groups, rows, size))
            for groups, rows, size in group_blocks(x, weight.shape[0], weight.shape[1], A.shape[0])
        )
        with autocast_off(x):
            return linear_by_blocks(x, bias, weight.shape[0], blocks)

    @staticmethod
    @first_only
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.by_triton and not ctx.needs_input_grad[1]:  # before `saved_tensors`, which may be read only once
            return _backward_by_triton(ctx, dy)
        x, entries, A, B = ctx.saved_tensors
        weight = put_together(entries, ctx.rest)
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dtype, scaling, offset = score_dtype(weight.dtype), ctx.scaling, ctx.offset
        A_wide, B_wide = A.to(dtype), B.to(dtype)
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx, dA, dB = None, torch.zeros_like(A_wide), torch.zeros_like(B_wide)
        dentries, buffers = torch.empty_like(entries) if needs_weight else None, Buffers(x)
        with autocast_off(x):
            for groups, rows, size in group_blocks(x, weight.shape[0], weight.shape[1], A.shape[0]):
                dy_rows, A_block, B_block = dy[:, rows], A_wide[groups], B_wide[rows]
                block = weight_rows(weight, rows, buffers)  # (rows, in)
                out = buffers.get("W or G", block.shape, dtype)
                if needs_x:
                    W = scaled_rows(block, A_block, B_block, size, scaling, offset, x.dtype, out)
                    dx = add_product(dx, dy_rows, W)
                if not (needs_A or needs_B or needs_weight):
                    continue
                G = outer_product(dy_rows, tokens, dtype, out)  # (rows, in)
                if dentries is not None:
                    dblock = scaled_rows(G, A_block, B_block, size, scaling, offset, weight.dtype)
                    write_rows(dentries, weight, rows, dblock)
                H = G.mul_(block).view(A_block.shape[0], size, -1)  # (groups, rows per group, in)
                dA_block, dB[rows] = factor_gradients(H, A_block, B_block, scaling)
                dA[groups] += dA_block
        return (
            None if dx is None else dx.view(x.shape),
            dentries,
            dy.sum(0) if needs_bias else None,
            dA.to(A.dtype) if needs_A else None,
            dB.to(B.dtype) if needs_B else None,
            *[None] * (2 + len(ctx.rest)),
        )


def _backward_by_triton(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The backward of a layer whose weight is frozen."""
    from peft_sparse.ops import triton_spp  # needs triton

    x, entries, A, B = ctx.saved_tensors
    weight = put_together(entries, ctx.rest)
    needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
    tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx, dA, dB = triton_spp.gradients(
        tokens, dy, weight, A, B, ctx.scaling, ctx.offset, needs_x, needs_factors=needs_A or needs_B
    )
    return (
        None if dx is None else dx.view(x.shape),
        None,
        dy.sum(0) if needs_bias else None,
        dA.to(A.dtype) if dA is not None and needs_A else None,
        dB.to(B.dtype) if dB is not None and needs_B else None,
        *[None] * (2 + len(ctx.rest)),
    )
