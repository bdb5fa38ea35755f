"""How long ways to compute one layer take, relative to each other, on a machine that does other things as well.

The ways take turns within a round, each round in another order; a way's time in a round is divided by the baseline's
of the same round, and the ratio is the median over the rounds: a machine that slows down for a while slows all of
them. A way that is short is called several times for one time. Nothing random is drawn from the global generator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

MIN_SECONDS = 2e-4  # of one time: what is shorter is called several times for it
MAX_CALLS = 64
MIN_ROUNDS, MAX_ROUNDS = 5, 15
BUDGET_SECONDS = 0.25  # after which no more rounds are begun than the fewest

Run = Callable[[], torch.Tensor]


def measure_ratios(runs: Mapping[str, Run], baseline: str, device: torch.device) -> dict[str, float]:
    """Time each way of computing the same thing.

    Args:
        runs: by name.
        baseline: the one that the others are divided by.

    Returns:
        Time relative to the baseline's, by name; 1.0 for itself.
    """
    for run in runs.values():  # warm-up: caches, buffers, kernels that are compiled at their first use
        _seconds(run, 1, device)
    first = _seconds(runs[baseline], 1, device)
    calls = min(MAX_CALLS, max(1, round(MIN_SECONDS / max(first, 1e-9))))
    names = list(runs)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - begin > BUDGET_SECONDS:
            break
        shift = turn % len(names)
        times = {name: _seconds(runs[name], calls, device) for name in names[shift:] + names[:shift]}
        for name in names:
            ratios[name].append(times[name] / times[baseline])
    return {name: statistics.median(values) for name, values in ratios.items()}


def _seconds(run: Run, calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def example_input(tokens: int, in_features: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, tokens, in): numbers from the normal distribution, the same at every call."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, in_features, generator=generator).to(device, dtype)
