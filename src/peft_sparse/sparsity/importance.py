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
    return magnitude.mul_(column_norms.to(device=magnitude.device, dtype=magnitude.dtype))


def ria_importance(weight: torch.Tensor, column_norms: torch.Tensor, exponent: float = 0.5) -> torch.Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a, the relative importance and activations of RIA.

    A weight counts by its share of its input's column and of its output's row, so that no row or column loses all of
    its weights for being small. In a column or row of zeros the share is 0.

    Args:
        weight: (out, in).
        column_norms: (in,) norms of the input columns, see [`ColumnNorms`].
        exponent: a, at least 0; with 0 the activations do not count.
    """
    magnitude = magnitude_importance(weight)
    columns, rows = magnitude.sum(0), magnitude.sum(1)
    shares = columns.masked_fill(columns == 0, 1).reciprocal() + rows.masked_fill(rows == 0, 1).reciprocal()[:, None]
    norms = column_norms.to(device=magnitude.device, dtype=magnitude.dtype)
    return shares.mul_(magnitude).mul_(norms**exponent)


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
