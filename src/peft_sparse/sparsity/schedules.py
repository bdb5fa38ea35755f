"""Schedules: the sparsity at a training step.

With T total steps, warm-ups i and f given as fractions of T, and the sparsity going from s_i to s_f:

    s(t) = s_i                                                       t <= i T
    s(t) = s_f + (s_i - s_f) (1 - (t - i T) / (T - (i + f) T))^p     in between
    s(t) = s_f                                                       t >  T - f T

p = 3 is the cubic schedule of Zhu and Gupta (arXiv 1710.01878) that PST uses, p = 1 the linear one; the constant
schedule is s_f from the first step on.
"""

from __future__ import annotations

POWERS = {"cubic": 3, "linear": 1}
SCHEDULES = (*POWERS, "constant")


def sparsity_at(
    schedule: str,
    step: int,
    total_steps: int,
    initial_sparsity: float,
    final_sparsity: float,
    initial_warmup: float = 0.1,
    final_warmup: float = 0.3,
) -> float:
    """The sparsity after `step` optimizer steps, used in the next forward.

    Args:
        schedule: `"cubic"`, `"linear"` or `"constant"`.
        step: optimizer steps done; 0 before training. Past `total_steps` the final sparsity stays.
        total_steps: T > 0.
        initial_sparsity, final_sparsity: s_i and s_f.
        initial_warmup, final_warmup: i and f, fractions of T that sum to at most 1.

    Examples:
        >>> [round(sparsity_at("cubic", t, 100, 0.0, 0.9), 4) for t in (0, 10, 11, 40, 70, 100)]
        [0.0, 0.0, 0.0443, 0.7875, 0.9, 0.9]
    """
    if schedule == "constant":
        return final_sparsity
    start, end = initial_warmup * total_steps, total_steps - final_warmup * total_steps
    if step <= start:
        return initial_sparsity
    if step > end or step >= total_steps or end <= start:
        return final_sparsity
    remaining = 1 - (step - start) / (total_steps * (1 - final_warmup - initial_warmup))
    return final_sparsity + (initial_sparsity - final_sparsity) * remaining ** POWERS[schedule]
