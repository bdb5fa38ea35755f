"""The rule of `accelerate_sparse` measured again: no layer is more than 5% slower than it was dense.

    python -m benchmarks.never_slower                      # SmolLM2-135M of `make demo`, and a 2048 x 2048 layer

All layers of the pruned model are timed once more, one by one, beside their dense selves, for each number of tokens;
after the choice, by the runner of all benchmarks. A row has the layers of one place in the block; `ratio_dense` is the
worst of them, `ratio_dense_median` the median. Rows in which everything is dense say how far the measurement itself is
off.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import models, runner
from benchmarks.model_step import _model
from peft_sparse import accelerate_sparse, prune_magnitude
from peft_sparse.inference import LayerChoice

SPARSITIES = (0.5, 0.75, 0.9)
TOKENS = (1, 4, 16, 64)
WIDE = 2048
LIMIT = 1.05
CALLS = 4  # for one time


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each model, sparsity, place in the block and number of tokens."""
    model = _model(args)
    rows = []
    for sparsity in args.sparsities:
        loaded = prune_magnitude(models.load(model, args.dtype, args.device), sparsity=sparsity)
        rows += _rows(loaded, models.describe(model), sparsity, args)
        wide = nn.Sequential(nn.Linear(*(2 * [64 if args.quick else WIDE]), bias=False)).to(args.dtype)
        rows += _rows(prune_magnitude(wide, sparsity=sparsity, target_modules=["0"]), "one layer", sparsity, args)
    slow = [row for row in rows if row["ratio_dense"] > LIMIT]
    print(f"{len(slow)} of {len(rows)} rows have a layer that is more than {LIMIT - 1:.0%} slower than dense")
    return rows


@torch.no_grad()
def _rows(model: nn.Module, name: str, sparsity: float, args: argparse.Namespace) -> list[runner.Row]:
    dense = copy.deepcopy(model)
    report = accelerate_sparse(model)
    print(f"{name}, {sparsity:.0%} zeros:\n{report}")
    places: dict[str, list[LayerChoice]] = {}
    for layer in report.layers:
        places.setdefault(re.sub(r"\.\d+\.", ".*.", layer.name), []).append(layer)
    rows = []
    for place, layers in places.items():
        for tokens in TOKENS:
            ratios, used = [], set()
            for layer in layers[:: max(1, len(layers) // args.layers)]:
                own, before = model.get_submodule(layer.name), dense.get_submodule(layer.name)
                used.add(_used(own, tokens))
                times = runner.interleave(_steps(own, before, tokens), args.rounds, args.device)
                ratios.append(times.ratio("chosen", "dense"))
            rows.append(
                {"model": name, "sparsity": sparsity, "tokens": tokens, "variant": place.split(".")[-1]}
                | {"chosen": " and ".join(sorted(used)), "layers": len(ratios)}
                | {"ratio_dense": max(ratios), "ratio_dense_median": statistics.median(ratios)}
            )
    return rows


def _used(linear: nn.Module, tokens: int) -> str:
    acceleration = getattr(linear, "_acceleration", None)
    operand = None if acceleration is None else acceleration.by_tokens(tokens)
    return "dense" if operand is None else operand.name


def _steps(own: nn.Module, dense: nn.Module, tokens: int) -> dict[str, Callable[[], None]]:
    x = torch.ones(1, tokens, dense.weight.shape[1], dtype=dense.weight.dtype, device=dense.weight.device)

    def step(linear: nn.Module) -> None:
        for _ in range(CALLS):
            linear(x)

    return {"dense": lambda: step(dense), "chosen": lambda: step(own)}


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=15)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument("--layers", type=int, default=5, help="of each place that are measured (default: 5)")
    found.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("never_slower", options(), measure))
