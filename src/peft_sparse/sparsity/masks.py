"""Masks: from importance scores to the set of kept weights, with an exact count.

A mask is bool and has the weight's shape; True = kept. In every group, the `num_pruned` weights with the smallest
scores go; of equal scores, those with the lower index go first. So the count is exact whatever the ties, and the same
scores give the same mask on every device.
"""

from __future__ import annotations

import torch


def select_mask(scores: torch.Tensor, num_pruned: int, group_size: int) -> torch.Tensor:
    """Keep all but the `num_pruned` smallest scores of every group.

    The threshold is found by selection rather than by a sort, and is compared with the scores in a second pass.

    Args:
        scores: importance, any shape; consecutive runs of `group_size` entries (row-major) form the groups. A NaN
            counts as larger than any number.
        num_pruned: how many entries of each group to prune, from 0 to `group_size`.
        group_size: a divisor of `scores.numel()`.

    Returns:
        bool, the shape of `scores`; True = kept, exactly `group_size - num_pruned` of them in each group.

    Example:
        >>> select_mask(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), num_pruned=2, group_size=4)
        tensor([[ True, False, False,  True]])
    """
    if not 0 <= num_pruned <= group_size:
        raise ValueError(f"`num_pruned` must lie in [0, group_size={group_size}], got {num_pruned}.")
    if num_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    groups = scores.detach().reshape(-1, group_size)
    threshold = groups.kthvalue(num_pruned, dim=1, keepdim=True).values
    below, tied = groups < threshold, groups == threshold
    # NaN is the largest for kthvalue but equals nothing: a group whose threshold is NaN prunes its first NaNs.
    if threshold.isnan().any():
        below = below | (threshold.isnan() & ~groups.isnan())
        tied = tied | (threshold.isnan() & groups.isnan())
    still_to_prune = num_pruned - below.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > still_to_prune).any()):
        tied &= tied.cumsum(1) <= still_to_prune
    return ~(below | tied).reshape(scores.shape)


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
        signed = torch.full_like(weight, smallest, dtype=torch.float32).copysign(weight)
        rounded = torch.where(vanished, signed.to(dtype), rounded)
    return rounded
