"""The rule of `accelerate_sparse` measured again: no layer is more than 5% slower than it was dense.

    python -m benchmarks.never_slower                      # SmolLM2-135M of `make demo`, and stacks of other shapes
    python -m benchmarks.never_slower --device cuda --dtype bfloat16 --sparsities 2:4 0.75   # the Triton kernel too

By the protocol of `stacks.py`, for numbers of tokens that were asked for and others. A row has the layers of one place
in the blocks, as they were and as they are, with the same weights: `ratio_dense` where each is computed after the
others, `ratio_cached` where one is called over and over. Beside each, the ratio of the dense layers to themselves says
how far the measurement is off, and `ratio_spread` how much the rounds differ. `left` says whether the layers are the
plain linears that they were before.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks import models, runner, stacks
from benchmarks.model_step import _model
from peft_sparse import accelerate_sparse, ops
from peft_sparse.linears import acceleration_of, in_out_features

SPARSITIES = ("0.5", "0.75", "0.9")
TOKENS = (1, 3, 4, 8, 33, 64)
SHAPES = ("2048x2048", "4096x4096", "11008x4096", "1000x3000", "777x1333")  # out x in
QUICK_SHAPES = ("64x48",)
STACK_BYTES = 1 << 28
LIMIT = 1.05


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each model or shape, sparsity, place in the block and number of tokens."""
    rows = []
    with ops.use_triton(args.device.type == "cuda"):
        for sparsity in args.sparsities:
            for name, model in _models(sparsity, args):
                rows += _rows(model, name, sparsity, args)
    for column in ("ratio_dense", "ratio_control", "ratio_cached", "ratio_cached_control"):
        slow = sum(row[column] > LIMIT for row in rows)
        print(f"{column}: {slow} of {len(rows)} rows are above {LIMIT}, the largest is {max(r[column] for r in rows)}")
    return rows


def _models(sparsity: str, args: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    if "model" in args.cases:
        model = _model(args)
        yield models.describe(model), models.prune(models.load(model, args.dtype, args.device), sparsity)
    for shape in QUICK_SHAPES if args.quick else [case for case in args.cases if case != "model"]:
        stack = stacks.stack_of(*map(int, shape.split("x")), args, STACK_BYTES)
        places = [str(place) for place in range(len(stack))]
        yield shape, models.prune(stack, sparsity, target_modules=places)


@torch.no_grad()
def _rows(model: nn.Module, name: str, sparsity: str, args: argparse.Namespace) -> list[runner.Row]:
    before = {layer: stacks.twin(module) for layer, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = accelerate_sparse(model)
    print(f"{name}, {sparsity}:\n{report}")
    places: dict[str, list[str]] = {}
    for layer in report.layers:
        places.setdefault(re.sub(r"(^|\.)\d+($|\.)", r"\1*\2", layer.name), []).append(layer.name)
    rows = []
    for tokens in TOKENS:
        for place, layers in places.items():
            after = [model.get_submodule(layer) for layer in layers]
            x = _input(after[0], tokens)
            ways = {"dense": stacks.runs([before[layer] for layer in layers], x), "chosen": stacks.runs(after, x)}
            times, cached = stacks.compare(ways, args), stacks.compare_cached(ways, args)
            rows.append(
                {"model": name, "sparsity": sparsity, "tokens": tokens, "variant": place.split(".")[-1]}
                | {"chosen": _used(after[0], tokens), "left": acceleration_of(after[0]) is None, "layers": len(layers)}
                | {"median_ms": times.median_ms("chosen"), "ratio_dense": times.ratio("chosen", "dense")}
                | {"ratio_control": times.ratio("control", "dense")}
                | {"ratio_cached": cached.ratio("chosen", "dense")}
                | {"ratio_cached_control": cached.ratio("control", "dense")}
                | {"ratio_spread": times.ratio_spread("chosen", "dense")}
            )
    return rows


def _input(linear: nn.Module, tokens: int) -> torch.Tensor:
    weight = linear.get_parameter("weight")
    return torch.ones(1, tokens, in_out_features(linear)[0], dtype=weight.dtype, device=weight.device)


def _used(linear: nn.Module, tokens: int) -> str:
    acceleration = acceleration_of(linear)
    operand = None if acceleration is None else acceleration.by_tokens(tokens)
    return "dense" if operand is None else operand.name


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=25)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument(
        "--cases", nargs="+", default=("model", *SHAPES), help="`model` and shapes of layers (default: model and five)"
    )
    found.add_argument("--sparsities", nargs="+", default=SPARSITIES, help="or N:M (default: 0.5 0.75 0.9)")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("never_slower", options(), measure))
