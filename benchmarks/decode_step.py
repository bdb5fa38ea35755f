"""A layer and one token, as text is decoded: the dense layer, the lists of its non-zeros, its values and bitmask, what
`accelerate_sparse` chooses, and the dense layer and values and bitmask in bfloat16.

    python -m benchmarks.decode_step                 # 2048 and 4096 square
    python -m benchmarks.decode_step --tokens 8

Times are of a layer in a stack of different ones of the same size, see `stacks.py`, all of them computed in one way;
`ratio_cached` is of one layer called over and over. `dense_bf16` is F.linear, `dense_bf16_mv` torch.mv, which is the
faster of the two for one token on some machines. Nothing is reported if a variant computes something else than dense.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping

import torch
from torch import nn

from benchmarks import runner, stacks
from peft_sparse import accelerate_sparse, prune_magnitude
from peft_sparse.linears import acceleration_of
from peft_sparse.native import unavailable

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
CASES = ((2048, 2048), (4096, 4096))  # (out, in)
QUICK_CASES = ((64, 48),)
TOLERANCE = {"dense_bf16": 2e-2, "dense_bf16_mv": 2e-2, "bitmask_bf16": 2e-2}  # of the norm; 1e-4 for the others


def make_stacks(dense: nn.Sequential, tokens: int) -> dict[str, nn.Sequential]:
    """The accelerated ones, which share the weights of the dense one, and that in bfloat16."""
    made = {name: nn.Sequential(*map(stacks.twin, dense)) for name in ("csr", "bitmask", "chosen")}
    made["dense_bf16"] = copy.deepcopy(dense).bfloat16()
    made["bitmask_bf16"] = nn.Sequential(*map(stacks.twin, made["dense_bf16"]))
    for name, kernel in (("csr", "csr"), ("bitmask", "bitmask"), ("bitmask_bf16", "bitmask"), ("chosen", None)):
        if kernel in (None, "csr") or unavailable() is None:
            accelerate_sparse(made[name], tokens, kernel=kernel)
        else:
            del made[name]
    return made


def make_ways(dense: nn.Sequential, others: Mapping[str, nn.Sequential], tokens: int) -> dict[str, list[stacks.Run]]:
    """For each variant a function for each layer that computes Y of the same X, which lies there in its dtype."""
    x = torch.randn(1, tokens, dense[0].in_features, generator=torch.Generator().manual_seed(0))
    ways = {"dense": stacks.runs(dense, x)}
    for name, layers in others.items():
        ways[name] = stacks.runs(layers, x.bfloat16() if name.endswith("bf16") else x)
    if tokens == 1:
        vector = x.bfloat16().view(-1)
        ways["dense_bf16_mv"] = [lambda w=linear.weight: torch.mv(w, vector) for linear in others["dense_bf16"]]
    return ways


def _check(ways: Mapping[str, list[stacks.Run]]) -> None:
    expected = ways["dense"][0]()
    for name, way in ways.items():
        error = float((way[0]().float().view_as(expected) - expected).norm() / expected.norm())
        if not error <= TOLERANCE.get(name, 1e-4):
            raise SystemExit(f"No benchmark is reported: {name} differs from dense by {error:.1e} of its norm.")


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each variant, shape and sparsity."""
    return [
        row
        for out, columns in (QUICK_CASES if args.quick else CASES)
        for sparsity in args.sparsities
        for row in _rows(out, columns, sparsity, args)
    ]


def _rows(out: int, columns: int, sparsity: float, args: argparse.Namespace) -> list[runner.Row]:
    dense = stacks.stack_of(out, columns, args)
    prune_magnitude(dense, sparsity=sparsity, target_modules=[str(place) for place in range(len(dense))])
    others = make_stacks(dense, args.tokens)
    ways = make_ways(dense, others, args.tokens)
    _check(ways)
    times = stacks.compare(ways, args, title=f"{out}x{columns}, {sparsity:.0%}")
    cached = stacks.compare_cached(ways, args)
    acceleration = acceleration_of(others["chosen"][0])
    chosen = "dense" if acceleration is None else acceleration.operands[args.tokens].name
    baselines = {"ratio_dense": "dense", "ratio_bf16": "dense_bf16", "ratio_bf16_mv": "dense_bf16_mv"}
    return [
        {"out": out, "in": columns, "tokens": args.tokens, "sparsity": sparsity, "variant": variant}
        | times.columns(variant, baselines)
        | {"ratio_cached": cached.ratio(variant, "dense"), "ratio_spread": times.ratio_spread(variant, "dense")}
        | {"speed_up": 1 / times.ratio(variant, "dense"), "chosen": chosen if variant == "chosen" else None}
        for variant in times.seconds
    ]


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=12)
    found.add_argument("--tokens", type=int, default=1, help="multiplied at a time (default: 1)")
    found.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 to 0.95 in seven")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("decode_step", options(), measure))
