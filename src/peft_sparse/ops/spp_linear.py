"""SPP's linear, fused: Y = X W_eff^T + b with W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]) (arXiv 2405.16057).

With G = dY^T X and H = G * W:

    dX = dY W_eff;    dA[g] = s sum over i in g of B[i] H[i];    dB[i] = s <H[i], A[g(i)]>.

Only X is saved. W_eff is rebuilt in the backward, block of row groups by block, so that no tensor of the weight's size
lives longer than its block. The plain twins are `spp_linear` and `spp_linear_update` in `peft_sparse.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from peft_sparse.ops.blocks import autocast_off, group_blocks, matmul_dtype
from peft_sparse.sparsity.importance import score_dtype


def spp_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.spp_linear`]: same arguments, same results."""
    dtype = matmul_dtype(x)
    return _SppLinear.apply(x.to(dtype), weight, None if bias is None else bias.to(dtype), A, B, scaling, 1.0)


def spp_linear_update(
    x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.spp_linear_update`]: the same function as `spp_linear`, without
    the 1 in W (1 + s B A)."""
    return _SppLinear.apply(x.to(matmul_dtype(x)), weight, None, A, B, scaling, 0.0)


def _scaled_rows(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    rows: int,
    scaling: float,
    offset: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W (offset + s B A) of one block of row groups, (rows of the block, in), rounded to `dtype`."""
    factors = (scaling * B).view(-1, rows, 1) * A[:, None, :]  # (groups, rows, in)
    factors.add_(offset).mul_(weight.reshape(factors.shape))
    return factors.view(weight.shape).to(dtype)


class _SppLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        A: torch.Tensor,  # (r, in)
        B: torch.Tensor,  # (out,)
        scaling: float,
        offset: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling, ctx.offset = scaling, offset
        factor_dtype = score_dtype(weight.dtype)
        A, B = A.to(factor_dtype), B.to(factor_dtype)
        tokens = x.reshape(-1, x.shape[-1])
        # Filled, not viewed: some models edit a linear's output in place, which autograd refuses on a view.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for groups, rows, size in group_blocks(weight.shape[0], weight.shape[1], A.shape[0]):
            block = _scaled_rows(weight[rows], A[groups], B[rows], size, scaling, offset, x.dtype)
            y.view(-1, y.shape[-1])[:, rows] = F.linear(tokens, block, None if bias is None else bias[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        factor_dtype, scaling = score_dtype(weight.dtype), ctx.scaling
        A32, B32 = A.to(factor_dtype), B.to(factor_dtype)
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.zeros_like(tokens) if needs_x else None
        dA, dB = torch.zeros_like(A32), torch.zeros_like(B32)
        dweight = torch.empty_like(weight) if needs_weight else None
        with autocast_off(x):
            for groups, rows, size in group_blocks(weight.shape[0], weight.shape[1], A.shape[0]):
                dy_rows = dy[:, rows]  # (tokens, rows)
                if dx is not None:
                    block = _scaled_rows(weight[rows], A32[groups], B32[rows], size, scaling, ctx.offset, x.dtype)
                    dx.addmm_(dy_rows, block)
                if not (needs_A or needs_B or needs_weight):
                    continue
                G = (dy_rows.T @ tokens).to(factor_dtype)  # (rows, in)
                B_groups, A_groups = B32[rows].view(-1, 1, size), A32[groups]
                if dweight is not None:
                    factors = _scaled_rows(
                        torch.ones_like(G), A_groups, B32[rows], size, scaling, ctx.offset, factor_dtype
                    )
                    dweight[rows] = (G * factors).to(weight.dtype)
                H = G.mul_(weight[rows]).view(A_groups.shape[0], size, -1)  # (groups, size, in)
                dA[groups] = scaling * (B_groups @ H).squeeze(1)
                dB[rows] = scaling * (H @ A_groups[:, :, None]).reshape(-1)
        return (
            None if dx is None else dx.view(x.shape),
            dweight,
            dy.sum(0) if needs_bias else None,
            dA.to(A.dtype) if needs_A else None,
            dB.to(B.dtype) if needs_B else None,
            None,
            None,
        )
