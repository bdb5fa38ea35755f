"""PST's linear, fused: Y = X (M * W')^T + b with W' = W + beta U V and M selected from the scores S (arXiv 2205.11005).

With G = dY^T X and the mask straight-through:

    dX = dY (M * W');    dS = G * W';    dW' = G * (M + |W'|), since S holds |W'| and it carries gradient;
    dU = beta dW' V^T,   dV = beta U^T dW',   dA = alpha1 dS B^T,   dB = alpha1 A^T dS,
    dR = alpha2 row sums of dS,   dC = alpha2 column sums of dS.

With other scores (movement, magnitude) S does not hold |W'|, and dW' = G * M. Only X and M are saved; W' is rebuilt in the
backward, block of rows by block. The plain twin is [`peft_sparse.ops.reference.pst_linear`].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from peft_sparse.ops.blocks import autocast_off, matmul_dtype, row_blocks
from peft_sparse.ops.reference import pst_updated_weight
from peft_sparse.sparsity.importance import score_dtype


def pst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    U: torch.Tensor | None = None,
    V: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    R: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    S: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.pst_linear`]: same arguments, same results."""
    dtype = matmul_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _PstLinear.apply(x.to(dtype), weight, bias, mask, U, V, D, A, B, R, C, S, beta, alpha1, alpha2)


def _rows(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


class _PstLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        mask: torch.Tensor,  # (out, in) bool
        U: torch.Tensor | None,  # (out, r)
        V: torch.Tensor | None,  # (r, in)
        D: torch.Tensor | None,  # (out, in)
        A: torch.Tensor | None,  # (out, score_r)
        B: torch.Tensor | None,  # (score_r, in)
        R: torch.Tensor | None,  # (out,)
        C: torch.Tensor | None,  # (in,)
        S: torch.Tensor | None,  # (out, in)
        beta: float,
        alpha1: float,
        alpha2: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mask, U, V, D, A, B, R, C, S)
        ctx.scales = beta, alpha1, alpha2
        tokens = x.reshape(-1, x.shape[-1])
        # Filled, not viewed: some models edit a linear's output in place, which autograd refuses on a view.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in row_blocks(*weight.shape):
            updated = pst_updated_weight(weight[rows], _rows(U, rows), V, _rows(D, rows), beta)
            block = (updated * mask[rows]).to(x.dtype)
            y.view(-1, y.shape[-1])[:, rows] = F.linear(tokens, block, _rows(bias, rows))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mask, U, V, D, *score_tensors = ctx.saved_tensors
        beta, alpha1, alpha2 = ctx.scales
        dtype = score_dtype(weight.dtype)
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        factors = [U, V, D, *score_tensors]  # in the order of the arguments from `U` on
        grads = [
            torch.zeros_like(factor, dtype=dtype) if needed else None
            for factor, needed in zip(factors, ctx.needs_input_grad[4:12], strict=True)
        ]
        dU, dV, dD, dA, dB, dR, dC, dS_own = grads
        A, B, _, _, _ = score_tensors
        magnitude_in_scores = A is not None
        needs_G = needs_weight or any(grad is not None for grad in grads)
        dx = torch.zeros_like(tokens) if needs_x else None
        dweight = torch.empty_like(weight) if needs_weight else None

        with autocast_off(x):
            for rows in row_blocks(*weight.shape):
                updated = pst_updated_weight(weight[rows], _rows(U, rows), V, _rows(D, rows), beta)  # (rows, in)
                dy_rows = dy[:, rows]  # (tokens, rows)
                if dx is not None:
                    dx.addmm_(dy_rows, (updated * mask[rows]).to(x.dtype))
                if not needs_G:
                    continue
                G = (dy_rows.T @ tokens).to(dtype)  # (rows, in)
                if dU is not None or dV is not None or dD is not None or dweight is not None:
                    dupdated = G * (mask[rows] + updated.abs()) if magnitude_in_scores else G * mask[rows]
                    if dU is not None:
                        dU[rows] = beta * (dupdated @ V.to(dtype).T)
                    if dV is not None:
                        dV.addmm_(U[rows].to(dtype).T, dupdated, alpha=beta)
                    if dD is not None:
                        dD[rows] = dupdated
                    if dweight is not None:
                        dweight[rows] = dupdated.to(weight.dtype)
                dS = G.mul_(updated)
                if dA is not None:
                    dA[rows] = alpha1 * (dS @ B.to(dtype).T)
                if dB is not None:
                    dB.addmm_(A[rows].to(dtype).T, dS, alpha=alpha1)
                if dR is not None:
                    dR[rows] = alpha2 * dS.sum(1)
                if dC is not None:
                    dC.add_(dS.sum(0), alpha=alpha2)
                if dS_own is not None:
                    dS_own[rows] = dS
        factor_grads = [
            None if grad is None else grad.to(factor.dtype) for grad, factor in zip(grads, factors, strict=True)
        ]
        return (
            None if dx is None else dx.view(x.shape),
            dweight,
            dy.sum(0) if needs_bias else None,
            None,
            *factor_grads,
            None,
            None,
            None,
        )
