"""The rule of `accelerate_sparse` measured again: no layer is more than 5% slower than it was dense.

    python -m benchmarks.never_slower                      # SmolLM2-135M of `make demo`, and one 2048 x 2048 layer

After the choice, by code that shares nothing with the one that chose: every linear of the pruned model is called once
in a round, in the model's order, as it is and as it was dense by turns, for numbers of tokens that were asked for and
others. A row has the layers of one place in the block: `ratio_dense` is the median of their ratios, `ratio_worst` the
largest. Where `chosen` is dense the two are the same code, or nearly, so those rows say how far the measurement itself
is off: layers that nobody touched come out slower where they follow one that was. `ratio_cached` is one of the layers
called over and over, its weight in a cache, which is not how a model runs.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks import models, runner
from benchmarks.model_step import _model
from peft_sparse import accelerate_sparse, prune_magnitude
from peft_sparse.linears import acceleration_of, in_out_features

SPARSITIES = (0.5, 0.75, 0.9)
TOKENS = (1, 4, 32, 64)
WIDE = 2048
LIMIT = 1.05
CALLS = 8  # for one time of a layer whose weight is in a cache


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each model, sparsity, place in the block and number of tokens."""
    model = _model(args)
    rows = []
    for sparsity in args.sparsities:
        loaded = prune_magnitude(models.load(model, args.dtype, args.device), sparsity=sparsity)
        rows += _rows(loaded, models.describe(model), sparsity, args)
        wide = nn.Sequential(nn.Linear(*(2 * [64 if args.quick else WIDE]), bias=False)).to(args.device, args.dtype)
        prune_magnitude(wide, sparsity=sparsity, target_modules=["0"])
        rows += _rows(wide, "one layer", sparsity, args)
    slow = [row for row in rows if row["ratio_dense"] > LIMIT]
    print(f"{len(slow)} of {len(rows)} rows are more than {LIMIT - 1:.0%} slower than dense")
    return rows


@torch.no_grad()
def _rows(model: nn.Module, name: str, sparsity: float, args: argparse.Namespace) -> list[runner.Row]:
    dense = copy.deepcopy(model)
    report = accelerate_sparse(model)
    print(f"{name}, {sparsity:.0%} zeros:\n{report}")
    pairs = {x.name: (dense.get_submodule(x.name), model.get_submodule(x.name)) for x in report.layers}
    rows = []
    for tokens in TOKENS:
        ratios = _ratios(pairs, tokens, args.rounds)
        places: dict[str, list[str]] = {}
        for layer in pairs:
            places.setdefault(re.sub(r"\.\d+\.", ".*.", layer), []).append(layer)
        for place, layers in places.items():
            before, after = pairs[layers[0]]
            x = _input(before, tokens)
            steps = {"dense": lambda m=before, x=x: _repeat(m, x), "chosen": lambda m=after, x=x: _repeat(m, x)}
            cached = runner.interleave(steps, args.rounds, args.device).ratio("chosen", "dense")
            own = [ratios[layer] for layer in layers]
            rows.append(
                {"model": name, "sparsity": sparsity, "tokens": tokens, "variant": place.split(".")[-1]}
                | {"chosen": _used(after, tokens), "layers": len(layers)}
                | {"ratio_dense": statistics.median(own), "ratio_worst": max(own), "ratio_cached": cached}
            )
    return rows


def _ratios(pairs: dict[str, tuple[nn.Module, nn.Module]], tokens: int, rounds: int) -> dict[str, float]:
    """For each layer, the median over the rounds of its time after the choice to its time before."""
    found: dict[str, list[float]] = {layer: [] for layer in pairs}
    for turn in range(-1, rounds):  # the first is a warm-up
        seconds: dict[int, dict[str, float]] = {}
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[which] = {}
            for layer, pair in pairs.items():
                module, x = pair[which], _input(pair[0], tokens)
                start = time.perf_counter()
                module(x)
                seconds[which][layer] = time.perf_counter() - start
        if turn >= 0:
            for layer in pairs:
                found[layer].append(seconds[1][layer] / seconds[0][layer])
    return {layer: statistics.median(values) for layer, values in found.items()}


def _input(linear: nn.Module, tokens: int) -> torch.Tensor:
    weight = linear.get_parameter("weight")
    return torch.ones(1, tokens, in_out_features(linear)[0], dtype=weight.dtype, device=weight.device)


def _repeat(linear: nn.Module, x: torch.Tensor) -> None:
    for _ in range(CALLS):
        linear(x)


def _used(linear: nn.Module, tokens: int) -> str:
    acceleration = acceleration_of(linear)
    operand = None if acceleration is None else acceleration.by_tokens(tokens)
    return "dense" if operand is None else operand.name


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=25)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("never_slower", options(), measure))
