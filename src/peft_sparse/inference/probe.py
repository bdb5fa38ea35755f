"""How long ways to compute a model's layers take, relative to each other, on a machine that does other things too.

A layer's time depends on where its weight comes from: called over and over it comes from a cache, as far as it fits;
in a model that is larger than the caches, from memory. What wins in one of them may lose in the other, by more than
half. So a pass goes through the layers one after the other, as a forward does, and computes each first once and then
`CACHED` times more. Memory is what a model's forward sees, and what is to be won; from a cache a way need only not
lose: its ratio is that from memory, or `CACHED_COUNTS` times that from a cache, whichever is more. The ways take turns
pass by pass, in another order each round; a way's time in a round is divided by the baseline's of the same round, and
a ratio is the median over the rounds: a machine that slows down for a while slows all of them. Nothing random is drawn
from the global generator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

CACHED = 2  # calls
CACHED_COUNTS = 0.95
MIN_SECONDS = 2e-4  # of one pass: what is shorter is gone through several times
MAX_PASSES = 32
MIN_ROUNDS, MAX_ROUNDS = 5, 15
BUDGET_SECONDS = 0.5  # after which no more rounds are begun than the fewest

Run = Callable[[], torch.Tensor]


def measure_ratios(
    layers: Sequence[tuple[int, Mapping[str, Run]]], baseline: str, device: torch.device
) -> dict[int, dict[str, float]]:
    """Time each way to compute each layer.

    Args:
        layers: in the order in which the model computes them: the number of its group, whose times are added up, and
            by name the ways to compute it, the same ones for all layers of a group.
        baseline: a way that every layer has, by which the others are divided. A layer without a way is computed by it
            in that way's passes, and not counted.

    Returns:
        For each group, time relative to the baseline's, by name, see above; 1.0 for itself.
    """
    names = list(dict.fromkeys(name for _, ways in layers for name in ways))
    for name in names:  # warm-up: caches, buffers, kernels that are compiled at their first use
        _pass(layers, name, baseline, device)
    first = sum(from_memory for from_memory, _ in _pass(layers, baseline, baseline, device).values())
    passes = min(MAX_PASSES, max(1, round(MIN_SECONDS / max(first, 1e-9))))
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    begin = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - begin > BUDGET_SECONDS:
            break
        shift = turn % len(names)
        times = {}
        for name in names[shift:] + names[:shift]:
            times[name] = _sums([_pass(layers, name, baseline, device) for _ in range(passes)])
        for name, seconds_of in times.items():
            for group, seconds in seconds_of.items():
                base = times[baseline][group]
                from_memory, from_cache = seconds[0] / base[0], seconds[1] / base[1]
                found.setdefault((group, name), []).append((from_memory, from_cache))
    ratios: dict[int, dict[str, float]] = {}
    for (group, name), pairs in found.items():
        from_memory, from_cache = map(statistics.median, zip(*pairs, strict=True))
        ratios.setdefault(group, {})[name] = max(from_memory, CACHED_COUNTS * from_cache)
    return ratios


def _pass(
    layers: Sequence[tuple[int, Mapping[str, Run]]], name: str, baseline: str, device: torch.device
) -> dict[int, tuple[float, float]]:
    """Seconds of each group that has this way: of the first calls, and of those right after them."""
    seconds: list[dict[int, tuple[float, float]]] = []
    for group, ways in layers:
        run = ways.get(name)
        if run is None:
            ways[baseline]()
            continue
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        then = time.perf_counter()
        for _ in range(CACHED):
            run()
        _synchronize(device)
        seconds.append({group: (then - start, time.perf_counter() - then)})
    return _sums(seconds)


def _sums(seconds: Sequence[Mapping[int, tuple[float, float]]]) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    for of_group in seconds:
        for group, (first, cached) in of_group.items():
            before = found.get(group, (0.0, 0.0))
            found[group] = (before[0] + first, before[1] + cached)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def example_input(tokens: int, in_features: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, tokens, in): numbers from the normal distribution, the same at every call."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, in_features, generator=generator, device="cpu").to(device, dtype)
