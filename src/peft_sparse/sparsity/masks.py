"""Masks: from importance scores to the set of kept weights, with an exact count.

A mask is bool and has the weight's shape; True = kept. In every group, the `num_pruned` weights with the smallest
scores go; of equal scores, those with the lower index go first. So the count is exact whatever the ties, and the same
scores give the same mask on every device.

Selecting costs a few passes over the scores and no sort: a large group brackets its threshold by the quantiles of a
sample, which leaves about one score in a hundred to look at; in groups of a few scores, each is ranked by comparison
with the others.
"""

from __future__ import annotations

import math

import torch

# Larger groups are selected from by a sample, which puts the threshold between two of its own quantiles, four standard
# deviations apart on either side.
MAX_WHOLE = 1 << 14
# Up to this size, comparing each score of a group with each other one is faster than selecting in every group.
MAX_COMPARED = 8
# Where groups are many, so many scores at a time: finding thresholds takes a copy of them and an int64 for each.
MAX_AT_ONCE = 1 << 20


def select_mask(scores: torch.Tensor, num_pruned: int, group_size: int) -> torch.Tensor:
    """Keep all but the `num_pruned` smallest scores of every group.

    Args:
        scores: importance, any shape; consecutive runs of `group_size` entries (row-major) form the groups. A NaN
            counts as larger than any number.
        num_pruned: how many entries of each group to prune, from 0 to `group_size`.
        group_size: a divisor of `scores.numel()`.

    Returns:
        bool, the shape of `scores`; True = kept, exactly `group_size - num_pruned` of them in each group.

    Raises:
        ValueError: if `num_pruned` is out of range.

    Examples:
        >>> select_mask(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), num_pruned=2, group_size=4)
        tensor([[ True, False, False,  True]])
    """
    if not 0 <= num_pruned <= group_size:
        raise ValueError(f"`num_pruned` must lie in [0, group_size={group_size}], got {num_pruned}.")
    if num_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    groups = scores.detach().reshape(-1, group_size)
    mask = None
    if groups.shape[0] == 1 and group_size > MAX_WHOLE:
        mask = _select_by_bracket(groups[0], num_pruned)
    elif group_size <= MAX_COMPARED and not bool(groups.isnan().any()):
        mask = _select_by_rank(groups, num_pruned)
    if mask is None:
        pieces = groups.split(max(1, MAX_AT_ONCE // group_size))
        mask = torch.cat([_select_by_threshold(piece, num_pruned) for piece in pieces])
    return mask.reshape(scores.shape)


def select_mask_in_graph(scores: torch.Tensor, num_pruned: torch.Tensor, group_size: int) -> torch.Tensor:
    """[`select_mask`] by two sorts, without a look at any value: for a graph that is recorded.

    Args:
        num_pruned: integer scalar.
    """
    groups = scores.detach().reshape(-1, group_size)
    # ONNX's own sort is stable, but torch's exporter translates none that has to be.
    found = groups.sort(dim=1) if torch.onnx.is_in_onnx_export() else groups.sort(dim=1, stable=True)
    ranks = found.indices.sort(dim=1).indices
    return (ranks >= num_pruned).reshape(scores.shape)


def _select_by_threshold(groups: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """For groups of any kind, (number, size): find each one's threshold, then compare with it."""
    (threshold,) = _smallest(groups, num_pruned)
    below, tied = groups < threshold, groups == threshold
    # NaN is the largest for kthvalue but equals nothing: a group whose threshold is NaN prunes its first NaNs.
    if threshold.isnan().any():
        below = below | (threshold.isnan() & ~groups.isnan())
        tied = tied | (threshold.isnan() & groups.isnan())
    still_to_prune = num_pruned - below.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > still_to_prune).any()):
        tied &= tied.cumsum(1) <= still_to_prune
    return ~(below | tied)


def _smallest(groups: torch.Tensor, *ranks: int) -> list[torch.Tensor]:
    """For each rank, counted from 1, the score of that rank in every group, (number, 1). NaN is the largest."""
    if _is_sorted_faster(groups):
        ordered = groups.sort(dim=1).values
        return [ordered[:, rank - 1 : rank] for rank in ranks]
    return [groups.kthvalue(rank, dim=1, keepdim=True).values for rank in ranks]


def _is_sorted_faster(groups: torch.Tensor) -> bool:
    """On a GPU kthvalue uses one multiprocessor for a group: 21 ms for four million scores, which sort in 0.45 ms."""
    return groups.is_cuda and groups.shape[0] == 1


def _select_by_bracket(scores: torch.Tensor, num_pruned: int) -> torch.Tensor | None:
    """For one large group, (size,): all but the scores in the bracket are decided by comparing with its ends.

    Returns:
        The mask, or None if the threshold is not in the bracket (the sample was no fair one).
    """
    sample = scores[:: _sample_stride(scores.numel())].contiguous()
    share = num_pruned / scores.numel()
    rank = round(share * sample.numel())
    margin = math.ceil(4 * math.sqrt(sample.numel() * share * (1 - share))) + 1
    low, high = _smallest(sample[None], max(rank - margin, 1), min(rank + margin, sample.numel()))
    low, high = low[0], high[0]
    # Written so that NaN, which fails every comparison, is kept.
    mask = (scores < low).logical_not_()
    num_below = scores.numel() - int(torch.count_nonzero(mask))
    undecided = (scores <= high).logical_and_(mask).nonzero()[:, 0]  # in the order of their indices
    still_to_prune = num_pruned - num_below
    if not 0 <= still_to_prune <= undecided.numel():
        return None
    if still_to_prune:
        kept = _select_by_threshold(scores[undecided][None], still_to_prune)[0]
        mask[undecided[~kept]] = False
    return mask


def _sample_stride(numel: int) -> int:
    """Every how many scores of a group one is in the sample: a prime, which does not keep step with the rows of a
    weight, whose scores have structure along rows and columns."""
    # Selecting from the sample, twice, and from what its bracket leaves costs least for about this size.
    stride = max(2, numel // round((2 * numel) ** (2 / 3)))
    while any(stride % divisor == 0 for divisor in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return stride


def _select_by_rank(groups: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """For many small groups without NaN, (number, size): a score is kept if enough others rank before it."""
    columns = groups.unbind(1)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=groups.device)
    for i, score in enumerate(columns):
        rank = torch.zeros(score.shape, dtype=torch.uint8, device=groups.device)
        for j, other in enumerate(columns):
            if j != i:
                rank += other <= score if j < i else other < score
        mask[:, i] = rank >= num_pruned
    return mask


def round_keeping_support(weight: torch.Tensor, support: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to `dtype` without creating zeros inside `support`.

    A small weight can underflow in float16, and a factor can cancel a weight exactly. Such an entry becomes the
    smallest number of `dtype` instead, which is within its rounding, so that the set of zeros stays what the mask
    says.

    Args:
        weight: any shape, any floating dtype.
        support: bool, same shape; where True the result is not zero.
        dtype: floating dtype of the result.
    """
    rounded = weight.to(dtype)
    vanished = (rounded == 0) & support
    if vanished.any():
        # Subnormals of bfloat16 and float32 may be flushed to zero by the hardware; float16's never are.
        smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        wide = torch.promote_types(dtype, torch.float32)  # float32 has no numbers as small as float64's
        signed = torch.full_like(weight, smallest, dtype=wide).copysign(weight)
        rounded = torch.where(vanished, signed.to(dtype), rounded)
    return rounded
