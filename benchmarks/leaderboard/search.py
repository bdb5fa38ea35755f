"""Which learning rate to try next: a walk uphill by a fixed factor, then bisection around the best.

A grid would be the same for all rows and so favour those whose best rate lies in it. Here every row has the same
number of tries but may walk as far as they reach: past the best rate if that is the highest or lowest one tried, else
between it and its better neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Rates = tuple[float, ...]
FACTOR = 3.0


def next_rates(tried: Sequence[tuple[Rates, float]], start: Rates, tries: int) -> Rates | None:
    """The rates of the next try.

    Args:
        tried: (rates, score) of the tries so far; lower is better, infinity for one that diverged.
        start: where to begin; as many numbers as the row has rates.
        tries: how many in all. Of two rates the first is searched with the first half of them, rounded up, then the
            second beside the best first one.

    Returns:
        None if there is nothing left to try.

    Examples:
        >>> next_rates([((1e-3,), 5.0)], (1e-3,), tries=4)
        (0.003,)
        >>> next_rates([((1e-3,), 5.0), ((3e-3,), 6.0)], (1e-3,), tries=4)
        (0.000333,)
    """
    if len(tried) >= tries or not start:
        return None
    if not tried:
        return start
    axis = 0 if len(start) == 1 or len(tried) < (tries + 1) // 2 else 1
    best, _ = min(tried, key=lambda pair: pair[1])
    line = {rates[axis]: score for rates, score in tried if _others(rates, axis) == _others(best, axis)}
    found = rounded(_next_on_line(line))
    return tuple(found if index == axis else rate for index, rate in enumerate(best))


def _others(rates: Rates, axis: int) -> Rates:
    return rates[:axis] + rates[axis + 1 :]


def _next_on_line(scores: dict[float, float]) -> float:
    rates = sorted(scores)
    best = min(rates, key=lambda rate: scores[rate])
    above = [rate for rate in rates if rate > best]
    below = [rate for rate in rates if rate < best]
    if not above:
        # A rate at which everything diverged says nothing about higher ones but that they are worse.
        return best * FACTOR if math.isfinite(scores[best]) else rates[0] / FACTOR**2
    if not below:
        return best / FACTOR
    neighbour = min((above[0], below[-1]), key=lambda rate: scores[rate])
    return math.sqrt(best * neighbour)


def rounded(rate: float) -> float:
    """Three significant digits, so that a rate reads the same in a table and in the store."""
    return float(f"{rate:.3g}")


def at_edge(tried: Sequence[tuple[Rates, float]]) -> bool:
    """Whether the best rate is the highest or lowest of those tried beside it, so that a better one may lie beyond."""
    best, _ = min(tried, key=lambda pair: pair[1])
    for axis in range(len(best)):
        line = sorted(rates[axis] for rates, _ in tried if _others(rates, axis) == _others(best, axis))
        if best[axis] in (line[0], line[-1]):
            return True
    return False
