"""PST's linear, fused: Y = X (M * W')^T + b with W' = W + beta U V and M selected from the scores S (PST,
arXiv 2205.11005).

With G = dY^T X and the mask straight-through:

    dX = dY (M * W');    dS = G * W';    dW' = G * (M + |W'|), since S holds |W'| and it carries gradient;
    dU = beta dW' V^T,   dV = beta U^T dW',   dA = alpha1 dS B^T,   dB = alpha1 A^T dS,
    dR = alpha2 row sums of dS,   dC = alpha2 column sums of dS.

With other scores (movement, magnitude) S does not hold |W'|, and dW' = G * M. Only X is saved, and M as bits; W' is
rebuilt in the backward, block of rows by block. The plain twin is [`peft_sparse.ops.reference.pst_linear`]; where
[`peft_sparse.ops.use_triton`] is on, layers on a GPU are computed by `peft_sparse.ops.triton_pst`.
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
    outer_product,
    row_blocks,
)
from peft_sparse.ops.derivatives import first_only
from peft_sparse.ops.reference import PstFactors, PstScales
from peft_sparse.ops.triton_switch import triton_takes_pst
from peft_sparse.sparsity import unpack_mask
from peft_sparse.sparsity.importance import score_dtype


def pst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor,
    factors: PstFactors,
    scales: PstScales,
) -> torch.Tensor:
    """The fused form of [`peft_sparse.ops.reference.pst_linear`]: same arguments, same results."""
    if reference.reference_in_use():
        return reference.pst_linear(x, weight, bias, packed_mask, factors, scales)
    dtype = matmul_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _PstLinear.apply(x.to(dtype), weight, bias, packed_mask, scales, *factors)


def _of_rows(factors: PstFactors, rows: slice) -> PstFactors:
    """The factors of a block of rows."""
    U, V, D, A, B, R, C, S = factors
    U, D, A, R, S = (None if factor is None else factor[rows] for factor in (U, D, A, R, S))
    return PstFactors(U, V, D, A, B, R, C, S)


def _updated_rows(
    weight: torch.Tensor, factors: PstFactors, beta: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """W' of a block of rows, a new tensor or `out`, in at least float32."""
    dtype = score_dtype(weight.dtype)
    if factors.U is not None and factors.V is not None:
        updated = torch.addmm(weight.to(dtype), factors.U.to(dtype), factors.V.to(dtype), alpha=beta, out=out)
    else:
        updated = weight.to(dtype, copy=True) if out is None else out.copy_(weight)
    return updated if factors.D is None else updated.add_(factors.D)


class _PstLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        packed_mask: torch.Tensor,  # (out, ceil(in / 8)) uint8
        scales: PstScales,
        *factor_tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, packed_mask, *factor_tensors)
        ctx.scales = scales
        factors, buffers, dtype = PstFactors(*factor_tensors), Buffers(x), score_dtype(weight.dtype)
        ctx.by_triton = triton_takes_pst(x, weight, factors)
        if ctx.by_triton:
            from peft_sparse.ops import triton_pst  # needs triton

            return triton_pst.forward(x, weight, bias, packed_mask, factors, scales[0])

        def build(rows: slice) -> torch.Tensor:  # M * W'
            shape = weight[rows].shape
            updated = _updated_rows(weight[rows], _of_rows(factors, rows), scales[0], buffers.get("W", shape, dtype))
            mask = unpack_mask(packed_mask[rows], shape[1], dtype, buffers.get("M", shape, dtype))
            return updated.mul_(mask).to(x.dtype)

        blocks = ((rows, partial(build, rows)) for rows in row_blocks(x, weight.shape[0], weight.shape[1]))
        with autocast_off(x):  # W' is formed in float32, and rounded once
            return linear_by_blocks(x, bias, weight.shape[0], blocks)

    @staticmethod
    @first_only
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.by_triton and not ctx.needs_input_grad[1]:  # before `saved_tensors`, which may be read only once
            return _backward_by_triton(ctx, dy)
        x, weight, packed_mask, *factor_tensors = ctx.saved_tensors
        factors, scales = PstFactors(*factor_tensors), PstScales(*ctx.scales)
        needs_x, needs_weight, needs_bias, _, _, *needs_factors = ctx.needs_input_grad
        dtype, buffers = score_dtype(weight.dtype), Buffers(x)
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx, dweight = None, torch.empty_like(weight) if needs_weight else None
        grads = _FactorGrads(factors, needs_factors, scales, dtype)
        with autocast_off(x):
            for rows in row_blocks(x, weight.shape[0], weight.shape[1]):
                shape = weight[rows].shape
                updated_out, mask_out, out = (buffers.get(name, shape, dtype) for name in ("W", "M", "product"))
                updated = _updated_rows(weight[rows], _of_rows(factors, rows), scales.beta, updated_out)  # (rows, in)
                mask = unpack_mask(packed_mask[rows], shape[1], dtype, mask_out)
                if needs_x:
                    masked = torch.mul(updated, mask, out=out).to(x.dtype)
                    dx = add_product(dx, dy[:, rows], masked)
                if not (needs_weight or any(needs_factors)):
                    continue
                # The mask is of no more use but here, and the masked weight was used up above.
                slope = mask.add_(torch.abs(updated, out=out)) if factors.A is not None else mask
                G = outer_product(dy[:, rows], tokens, dtype, out)  # (rows, in)
                dupdated = slope.mul_(G)
                if dweight is not None:
                    dweight[rows] = dupdated.to(weight.dtype)
                grads.add(rows, dupdated, dS=G.mul_(updated))
        return (
            None if dx is None else dx.view(x.shape),
            dweight,
            dy.sum(0) if needs_bias else None,
            None,
            None,
            *grads.finished(),
        )


def _backward_by_triton(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The backward of a layer whose weight is frozen."""
    from peft_sparse.ops import triton_pst  # needs triton

    x, weight, packed_mask, *factor_tensors = ctx.saved_tensors
    factors, scales = PstFactors(*factor_tensors), PstScales(*ctx.scales)
    needs_x, _, needs_bias, _, _, *needs_factors = ctx.needs_input_grad
    tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx, grads = triton_pst.gradients(
        tokens, dy, weight, packed_mask, factors, scales, needs_x, needs_factors=any(needs_factors)
    )
    return (
        None if dx is None else dx.view(x.shape),
        None,
        dy.sum(0) if needs_bias else None,
        None,
        None,
        *(
            getattr(grads, name).to(factor.dtype) if needed and factor is not None else None
            for (name, factor), needed in zip(factors._asdict().items(), needs_factors, strict=True)
        ),
    )


class _FactorGrads:
    """The factors' gradients, added up over blocks of rows.

    A with R and B with C share a product each: dS [B^T, 1] is [dA, dR], and [A, 1]^T dS is [dB; dC].
    """

    def __init__(self, factors: PstFactors, needed: list[bool], scales: PstScales, dtype: torch.dtype) -> None:
        self.factors, self.needed, self.scales = factors, dict(zip(factors._fields, needed, strict=True)), scales
        U, V, D, A, B, R, C, S = (None if factor is None else factor.to(dtype) for factor in factors)
        self.U, self.V = U, V
        self.A1 = None if A is None or R is None else torch.cat([A, torch.ones_like(R)[:, None]], 1)  # (out, r + 1)
        self.B1 = None if B is None or C is None else torch.cat([B, torch.ones_like(C)[None]])  # (r + 1, in)
        self.grads: dict[str, torch.Tensor] = {}
        for name, like in {"U": U, "V": V, "D": D, "A1": self.A1, "B1": self.B1, "S": S}.items():
            if like is not None:
                self.grads[name] = torch.zeros_like(like)

    def add(self, rows: slice, dupdated: torch.Tensor, dS: torch.Tensor) -> None:
        """Add what a block of rows contributes, given the gradients of its W' and of its scores."""
        needed, grads = self.needed, self.grads
        if self.U is not None and self.V is not None:
            if needed["U"]:
                grads["U"][rows] = dupdated @ self.V.T
            if needed["V"]:
                grads["V"].addmm_(self.U[rows].T, dupdated)
        if needed["D"]:
            grads["D"][rows] = dupdated
        if self.A1 is not None and self.B1 is not None:
            if needed["A"] or needed["R"]:
                grads["A1"][rows] = dS @ self.B1.T
            if needed["B"] or needed["C"]:
                grads["B1"].addmm_(self.A1[rows].T, dS)
        if needed["S"]:
            grads["S"][rows] = dS

    def finished(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of [`PstFactors`], scaled and of the factors' dtypes; None for those that need no gradient."""
        grads, (beta, alpha1, alpha2) = self.grads, self.scales
        found = {
            "U": lambda: beta * grads["U"],
            "V": lambda: beta * grads["V"],
            "D": lambda: grads["D"],
            "A": lambda: alpha1 * grads["A1"][:, :-1],
            "B": lambda: alpha1 * grads["B1"][:-1],
            "R": lambda: alpha2 * grads["A1"][:, -1],
            "C": lambda: alpha2 * grads["B1"][-1],
            "S": lambda: grads["S"],
        }
        return tuple(
            found[name]().to(factor.dtype) if factor is not None and self.needed[name] else None
            for name, factor in self.factors._asdict().items()
        )
