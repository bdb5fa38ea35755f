"""SPP's linear over the non-zeros of W alone, for weights of which few are left (arXiv 2405.16057).

The zeros of W are work that need not be done. With E the non-zero places of W, which SPP never changes:

    Y = X W_eff^T and dX = dY W_eff, with W_eff a sparse matrix: W[i, j] (1 + s B[i] A[g(i), j]) for (i, j) in E;
    H[i, j] = W[i, j] sum over tokens t of dY[t, i] X[t, j], for (i, j) in E only;
    dA[g] = s sum over i in g of B[i] H[i];    dB[i] = s <H[i], A[g(i)]>.

The list of places is made once per layer. Tokens are worked on in chunks, transposed so that a non-zero adds to
consecutive numbers, and small enough to stay in a core's cache. Same results as `spp_linear`, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peft_sparse.ops.derivatives import first_only
from peft_sparse.ops.reference import row_groups
from peft_sparse.sparsity import CsrMatrix

CHUNK_ELEMENTS = 1 << 18  # of X or dY
MIN_TOKENS, MAX_TOKENS = 64, 512  # in a chunk


def spp_csr_linear(
    x: torch.Tensor,
    csr: CsrMatrix,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    offset: float = 1.0,
) -> torch.Tensor:
    """[`peft_sparse.ops.spp_linear`] of a weight given by its non-zeros; the plain twin is the same.

    Args:
        x: (..., in), on the CPU, float32 or float64.
        csr: W, of the dtype of `x`.
        bias: (out,) or None, of the dtype of `x`.
        A, B, scaling: the factors of SPP.
        offset: 1, or 0 for the update alone.

    Returns:
        (..., out), of the dtype of `x`.
    """
    return _SppCsrLinear.apply(x, bias, A, B, csr, scaling, offset)


def _chunks(tokens: int, shape: tuple[int, int]) -> Iterator[slice]:
    step = min(MAX_TOKENS, max(MIN_TOKENS, CHUNK_ELEMENTS // max(shape)))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


class _Factors:
    """A[g(i), j] and B[i] at the non-zeros, and the sums that go back."""

    def __init__(self, csr: CsrMatrix, A: torch.Tensor, B: torch.Tensor) -> None:
        self.csr, self.A = csr, A
        counts = csr.row_starts.diff()
        first_entry = row_groups(csr.shape[0], A.shape[0], A.device).mul_(A.shape[1]).int()  # of A's row, (out,)
        self.places = first_entry.repeat_interleave(counts).add_(csr.columns)  # in A, flat (nnz,)
        self.A_values = A.view(-1).index_select(0, self.places)  # (nnz,)
        self.B_values = B.repeat_interleave(counts)  # (nnz,)

    def effective_values(self, scaling: float, offset: float) -> torch.Tensor:
        scaled = (self.A_values * self.B_values).mul_(scaling)
        return scaled.add_(offset).mul_(self.csr.values)

    def gradients(self, H: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """dA (r, in) and dB (out,), given H (nnz,)."""
        dA = torch.zeros_like(self.A).view(-1).index_add_(0, self.places, self.B_values.mul_(H))
        dB = torch.segment_reduce(self.A_values.mul_(H), "sum", offsets=self.csr.row_starts.long())
        return dA.mul_(scaling).view_as(self.A), dB.mul_(scaling)


class _SppCsrLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        bias: torch.Tensor | None,  # (out,)
        A: torch.Tensor,  # (r, in)
        B: torch.Tensor,  # (out,)
        csr: CsrMatrix,
        scaling: float,
        offset: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.csr, ctx.scaling, ctx.offset = csr, scaling, offset
        values = _Factors(csr, A.to(x.dtype), B.to(x.dtype)).effective_values(scaling, offset)
        W_eff = csr.with_values(values)
        tokens = x.reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], csr.shape[0])
        flat = y.view(-1, csr.shape[0])
        for chunk in _chunks(len(tokens), csr.shape):
            flat[chunk] = (W_eff @ tokens[chunk].T.contiguous()).T
        return y if bias is None else y.add_(bias)

    @staticmethod
    @first_only
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        csr = ctx.csr
        needs_x, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:4]
        factors = _Factors(csr, A.to(x.dtype), B.to(x.dtype))
        tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.empty_like(tokens) if needs_x else None
        W_eff_T = csr.transposed_with_values(factors.effective_values(ctx.scaling, ctx.offset)) if needs_x else None
        G = csr.with_values(torch.zeros_like(csr.values)) if needs_A or needs_B else None
        for chunk in _chunks(len(tokens), csr.shape):
            dy_T = dy[chunk].T.contiguous()  # (out, tokens of the chunk)
            if dx is not None and W_eff_T is not None:
                dx[chunk] = (W_eff_T @ dy_T).T
            if G is not None:
                # its second factor (tokens, in) is read by column: as the transpose of a contiguous one
                G = torch.sparse.sampled_addmm(G, dy_T, tokens[chunk].T.contiguous().T)
        dA = dB = None
        if G is not None:
            dA, dB = factors.gradients(G.values().mul_(csr.values), ctx.scaling)
        return (
            None if dx is None else dx.view(x.shape),
            dy.sum(0) if needs_bias else None,
            dA.to(A.dtype) if dA is not None and needs_A else None,
            dB.to(B.dtype) if dB is not None and needs_B else None,
            None,
            None,
            None,
        )
