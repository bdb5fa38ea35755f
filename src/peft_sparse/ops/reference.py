"""The obvious version of each op: plain PyTorch, written from the equations, differentiated by autograd.

It defines what is correct; the fused ops of this folder have the same signatures and are compared with it, forward and
backward. The two `*_weight` functions are the methods themselves, as maps from a weight to the effective weight;
merging and the composition of several adapters use them.

Weights are (out, in). Products are formed in at least float32 and rounded once, to the weight's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from peft_sparse._switch import Switch
from peft_sparse.ops.blocks import autocast_off
from peft_sparse.sparsity import (
    PackedWeight,
    Weight,
    dense_weight,
    pack_mask,
    pst_importance,
    select_mask,
    unpack_mask,
)
from peft_sparse.sparsity.importance import score_dtype


class use_reference(Switch):
    """Compute every layer with the functions of this module instead of the fused ones, to tell whether those are to
    blame for a result, or for derivatives of derivatives, which the fused ones do not have. Slower, and memory of the
    weight's size is kept for each layer. Inside of `torch.func`, forward-mode differentiation and `torch.jit.trace`
    it is always so.

    Args:
        enabled: False goes back to the fused ones.

    Examples:
        >>> _ = use_reference()  # from now on, or for some lines only:
        >>> with use_reference(enabled=False):
        ...     reference_in_use()
        False
        >>> _ = use_reference(enabled=False)
    """


def reference_in_use() -> bool:
    """Whether [`use_reference`] is on, or the fused functions cannot be differentiated, see [`transformed`]."""
    return use_reference._enabled or transformed()


def transformed() -> bool:
    """Inside of `torch.func`, forward-mode differentiation or `torch.jit.trace`, which fused functions and kernels
    know nothing of."""
    if torch.compiler.is_compiling():  # which looks into them
        return False
    if torch.jit.is_tracing():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def row_groups(out_features: int, num_groups: int, device: torch.device | None = None) -> torch.Tensor:
    """g(i): the group of each row, int64 (out,). Groups are contiguous and as equal as possible; the first ones are
    one row longer when out_features is not divisible by `num_groups`, and the last ones empty if there are more of
    them than rows.

    Examples:
        >>> row_groups(5, 2)
        tensor([0, 0, 0, 1, 1])
    """
    size, longer = out_features // num_groups, out_features % num_groups
    rows = torch.arange(out_features, device=device)
    # Among the longer groups the first term is larger, behind them the second. `torch.jit.trace` has tensors in the
    # place of numbers, so nothing is asked of these.
    return torch.maximum(rows // (size + 1), (rows - longer) // (size + (size == 0)))


def dense(weight: Weight) -> torch.Tensor:
    """(out, in) of a weight that may be packed, differentiable in its values, or quantised."""
    if not isinstance(weight, PackedWeight):
        return dense_weight(weight)
    mask = unpack_mask(weight.bitmask, weight.in_features)
    return weight.values.new_zeros(mask.shape).masked_scatter(mask, weight.values)


def packed_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Y = X W^T + b.

    Args:
        x: (..., in).
        weight: W, dense, packed or quantised.
        bias: (out,) or None.

    Returns:
        (..., out), of the dtype of `x`.
    """
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    return F.linear(x, dense(weight).to(x.dtype), bias)


def csr_linear(x: torch.Tensor, csr: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Y = X W^T + b, without a gradient.

    Args:
        x: (..., in).
        csr: W, (out, in), a sparse CSR tensor of the dtype of `x`.
        bias: (out,) or None, of the same.

    Returns:
        (..., out), of the dtype of `x`.
    """
    return F.linear(x, csr.to_dense(), bias)


def spp_weight(weight: Weight, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]), equation 5 of SPP (arXiv 2405.16057).

    Args:
        weight: W, (out, in), dense, packed or quantised.
        A: (r, in), one row per row group.
        B: (out,).
        scaling: s.

    Returns:
        (out, in), at least float32: a product of W, so every zero of W is a zero of it.
    """
    dtype = score_dtype(weight.dtype)
    factors = (scaling * B.to(dtype))[:, None] * A.to(dtype)[row_groups(weight.shape[0], A.shape[0], A.device)]
    wide = dense(weight).to(dtype)
    return torch.addcmul(wide, wide, factors)  # rounded as in the fused op, so that merging reproduces the forward


def spp_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Y = X W_eff^T + b, with W_eff of [`spp_weight`].

    Args:
        x: (..., in), of the weight's dtype.
        weight, A, B, scaling: see [`spp_weight`].
        bias: (out,) or None.

    Returns:
        (..., out), of the dtype of `x`.
    """
    return F.linear(x, spp_weight(weight, A, B, scaling).to(x.dtype), bias)


def spp_linear_update(
    x: torch.Tensor, weight: Weight, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Y = X (W_eff - W)^T: the update alone, which sees an input of its own when that is dropped out."""
    update = spp_weight(weight, A, B, scaling) - dense(weight)
    return F.linear(x, update.to(x.dtype))


class PstFactors(NamedTuple):
    """The trained tensors of a PST layer. Which of them are there decides the weight update and the importance."""

    U: torch.Tensor | None = None  # (out, r)        low-rank weight update
    V: torch.Tensor | None = None  # (r, in)
    D: torch.Tensor | None = None  # (out, in)       full weight update
    A: torch.Tensor | None = None  # (out, score_r)  PST's scores
    B: torch.Tensor | None = None  # (score_r, in)
    R: torch.Tensor | None = None  # (out,)
    C: torch.Tensor | None = None  # (in,)
    S: torch.Tensor | None = None  # (out, in)       movement scores


class PstScales(NamedTuple):
    """The constants of PST's equations."""

    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0


def pst_updated_weight(weight: torch.Tensor, factors: PstFactors, scales: PstScales) -> torch.Tensor:
    """W' = W + beta U V (low-rank), W + D (full) or W (none), (out, in) in at least float32."""
    dtype = score_dtype(weight.dtype)
    updated = weight.to(dtype)
    if factors.U is not None and factors.V is not None:
        with autocast_off(weight):
            updated = torch.addmm(updated, factors.U.to(dtype), factors.V.to(dtype), alpha=scales.beta)
    if factors.D is not None:
        updated = updated + factors.D.to(dtype)
    return updated


def pst_scores(updated_weight: torch.Tensor, factors: PstFactors, scales: PstScales) -> torch.Tensor:
    """Importance by which factors are there: S (movement); A, B, R, C (PST); none of them (magnitude).

    Returns:
        (out, in) in at least float32. Magnitude is data-free, so it carries no gradient.
    """
    _, _, _, A, B, R, C, S = factors
    if S is not None:
        return S.to(score_dtype(S.dtype))
    if A is not None and B is not None and R is not None and C is not None:
        with autocast_off(updated_weight):
            return pst_importance(updated_weight, A, B, R, C, scales.alpha1, scales.alpha2)
    return updated_weight.detach().abs()


def pst_weight(weight: torch.Tensor, mask: torch.Tensor, factors: PstFactors, scales: PstScales) -> torch.Tensor:
    """M * W', with the identity as the mask's gradient towards the scores (straight-through).

    Args:
        weight: W, (out, in), frozen.
        mask: M, bool (out, in), True = kept: selected from the scores of these same factors.

    Returns:
        (out, in), at least float32.
    """
    with autocast_off(weight):  # which would form products in half precision
        updated = pst_updated_weight(weight, factors, scales)
        scores = pst_scores(updated, factors, scales)
        straight_through = mask.to(scores.dtype) + (scores - scores.detach())
        return straight_through.to(updated.dtype) * updated


def pst_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor,
    factors: PstFactors,
    scales: PstScales,
) -> torch.Tensor:
    """Y = X (M * W')^T + b, with M * W' of [`pst_weight`].

    Args:
        x: (..., in), of the weight's dtype.
        weight, factors, scales: see [`pst_weight`].
        bias: (out,) or None.
        packed_mask: M as bits, see [`peft_sparse.sparsity.pack_mask`].

    Returns:
        (..., out), of the dtype of `x`.
    """
    mask = unpack_mask(packed_mask, weight.shape[1])
    return F.linear(x, pst_weight(weight, mask, factors, scales).to(x.dtype), bias)


def pst_mask(
    weight: torch.Tensor, num_pruned: int, group_size: int, factors: PstFactors, scales: PstScales
) -> torch.Tensor:
    """M as bits: all but the `num_pruned` smallest of [`pst_scores`] in each group of `group_size` weights."""
    updated = pst_updated_weight(weight, factors, scales)
    return pack_mask(select_mask(pst_scores(updated, factors, scales), num_pruned, group_size))
