"""PST's linear, fused: Y = X (M * W')^T + b with W' = W + beta U V and M selected from the scores S (PST,
arXiv 2205.11005).

With G = dY^T X and the mask straight-through:

    dX = dY (M * W');    dS = G * W';    dW' = G * (M + |W'|), since S holds |W'| and it carries gradient;
    dU = beta dW' V^T,   dV = beta U^T dW',   dA = alpha1 dS B^T,   dB = alpha1 A^T dS,
    dR = alpha2 row sums of dS,   dC = alpha2 column sums of dS.

With other scores (movement, magnitude) S does not hold |W'|, and dW' = G * M. Only X and M are saved; W' is rebuilt
in the backward, block of rows by block. The plain twin is [`peft_sparse.ops.reference.pst_linear`].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from peft_sparse.ops.blocks import autocast_off, matmul_dtype, row_blocks
from peft_sparse.ops.reference import PstFactors, PstScales, pst_updated_weight
from peft_sparse.sparsity.importance import score_dtype


def pst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    factors: PstFactors,
    scales: PstScales,
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.pst_linear`]: same arguments, same results."""
    dtype = matmul_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _PstLinear.apply(x.to(dtype), weight, bias, mask, scales, *factors)


def _rows(factors: PstFactors, rows: slice) -> PstFactors:
    """The factors of a block of rows."""
    by_row = {name: factor[rows] for name in "UDARS" if (factor := getattr(factors, name)) is not None}
    return factors._replace(**by_row)


class _PstLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        mask: torch.Tensor,  # (out, in) bool
        scales: PstScales,
        *factor_tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mask, *factor_tensors)
        ctx.scales = scales
        factors = PstFactors(*factor_tensors)
        tokens = x.reshape(-1, x.shape[-1])
        # Filled, not viewed: some models edit a linear's output in place, which autograd refuses on a view.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in row_blocks(*weight.shape):
            block = pst_updated_weight(weight[rows], _rows(factors, rows), scales).mul(mask[rows]).to(x.dtype)
            y.view(-1, y.shape[-1])[:, rows] = F.linear(tokens, block, None if bias is None else bias[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mask, *factor_tensors = ctx.saved_tensors
        factors, scales = PstFactors(*factor_tensors), ctx.scales
        needs_x, needs_weight, needs_bias, _, _, *needs_factors = ctx.needs_input_grad
        dtype = score_dtype(weight.dtype)
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.zeros_like(tokens) if needs_x else None
        dweight = torch.empty_like(weight) if needs_weight else None
        grads = PstFactors(
            *(
                torch.zeros_like(factor, dtype=dtype) if factor is not None and needed else None
                for factor, needed in zip(factors, needs_factors, strict=True)
            )
        )
        with autocast_off(x):
            for rows in row_blocks(*weight.shape):
                row_factors = _rows(factors, rows)
                updated = pst_updated_weight(weight[rows], row_factors, scales)  # (rows, in)
                dy_rows = dy[:, rows]  # (tokens, rows)
                if dx is not None:
                    dx.addmm_(dy_rows, updated.mul(mask[rows]).to(x.dtype))
                if dweight is None and not any(needs_factors):
                    continue
                G = (dy_rows.T @ tokens).to(dtype)  # (rows, in)
                dupdated = G * (mask[rows] + updated.abs()) if factors.A is not None else G * mask[rows]
                if dweight is not None:
                    dweight[rows] = dupdated.to(weight.dtype)
                _add_factor_grads(grads, rows, row_factors, dupdated, dS=G.mul_(updated), scales=scales)
        return (
            None if dx is None else dx.view(x.shape),
            dweight,
            dy.sum(0) if needs_bias else None,
            None,
            None,
            *(
                None if grad is None or factor is None else grad.to(factor.dtype)
                for grad, factor in zip(grads, factors, strict=True)
            ),
        )


def _add_factor_grads(
    grads: PstFactors,
    rows: slice,
    row_factors: PstFactors,
    dupdated: torch.Tensor,
    dS: torch.Tensor,
    scales: PstScales,
) -> None:
    """Add what a block of rows contributes to the factors' gradients, given those of its W' and S."""
    dU, dV, dD, dA, dB, dR, dC, dscores = grads
    U, V, _, A, B, _, _, _ = row_factors
    if dU is not None and V is not None:
        dU[rows] = scales.beta * (dupdated @ V.to(dupdated.dtype).T)
    if dV is not None and U is not None:
        dV.addmm_(U.to(dupdated.dtype).T, dupdated, alpha=scales.beta)
    if dD is not None:
        dD[rows] = dupdated
    if dA is not None and B is not None:
        dA[rows] = scales.alpha1 * (dS @ B.to(dS.dtype).T)
    if dB is not None and A is not None:
        dB.addmm_(A.to(dS.dtype).T, dS, alpha=scales.alpha1)
    if dR is not None:
        dR[rows] = scales.alpha2 * dS.sum(1)
    if dC is not None:
        dC.add_(dS.sum(0), alpha=scales.alpha2)
    if dscores is not None:
        dscores[rows] = dS
