"""Importance scores: how much a weight matters. Shape of the weight, larger = keep.

Scores are at least float32, whatever the weight's dtype: bfloat16 weights tie by the thousand, and a product of
factors needs the digits.
"""

from __future__ import annotations

import torch


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, the dtype itself otherwise (float64 stays)."""
    return torch.promote_types(dtype, torch.float32)


def magnitude_importance(weight: torch.Tensor) -> torch.Tensor:
    """|W|, (out, in)."""
    return weight.to(score_dtype(weight.dtype)).abs()


def wanda_importance(weight: torch.Tensor, column_norms: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||X_j||_2, equation 1 of Wanda (arXiv 2306.11695).

    Args:
        weight: (out, in).
        column_norms: (in,) norms of the input columns, see [`ColumnNorms`].
    """
    magnitude = magnitude_importance(weight)
    return magnitude * column_norms.to(device=magnitude.device, dtype=magnitude.dtype)


def pst_importance(
    updated_weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    R: torch.Tensor,
    C: torch.Tensor,
    alpha1: float,
    alpha2: float,
) -> torch.Tensor:
    """S = |W'| + alpha1 A B + alpha2 (R[:, None] + C[None, :]), equations 6 to 9 of PST (arXiv 2205.11005).

    Differentiable in every tensor, |W'| included, as in the authors' code.

    Args:
        updated_weight: W', (out, in).
        A, B: low-rank scores, (out, score_r) and (score_r, in).
        R, C: scores of whole rows (out,) and columns (in,).
    """
    dtype = score_dtype(updated_weight.dtype)
    scores = updated_weight.to(dtype).abs() + alpha1 * (A.to(dtype) @ B.to(dtype))
    return scores + alpha2 * (R.to(dtype)[:, None] + C.to(dtype)[None, :])
