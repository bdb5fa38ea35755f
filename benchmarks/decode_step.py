"""One layer and one token, as text is decoded: the dense layer, the lists of its non-zeros, what `accelerate_sparse`
chooses, and the dense layer in bfloat16.

    python -m benchmarks.decode_step                 # 2048 and 4096 square
    python -m benchmarks.decode_step --tokens 8

`dense_bf16` is F.linear, `dense_bf16_mv` torch.mv, which is the faster of the two for one token on some machines.
Nothing is reported if a variant computes something else than the dense layer.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import runner
from peft_sparse import accelerate_sparse, prune_magnitude
from peft_sparse.linears import acceleration_of

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
CASES = ((2048, 2048), (4096, 4096))  # (out, in)
QUICK_CASES = ((64, 48),)
TOLERANCE = {"dense_bf16": 2e-2, "dense_bf16_mv": 2e-2}  # of the norm; 1e-4 for the others


def make_layers(out: int, columns: int, sparsity: float, tokens: int) -> tuple[nn.Linear, dict[str, nn.Module]]:
    """The dense layer, and those that are made from it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Linear(columns, out, bias=False).requires_grad_(False)
    prune_magnitude(nn.Sequential(dense), sparsity=sparsity, target_modules=["0"])
    layers = {name: copy.deepcopy(dense) for name in ("csr", "chosen", "dense_bf16")}
    accelerate_sparse(layers["csr"], tokens, kernel="csr")
    accelerate_sparse(layers["chosen"], tokens)
    layers["dense_bf16"].bfloat16()
    return dense, layers


def make_steps(dense: nn.Linear, layers: dict[str, nn.Module], tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """A function for each variant that computes Y of the same X, which lies there in the variant's dtype."""
    x = torch.randn(1, tokens, dense.in_features, generator=torch.Generator().manual_seed(0))
    half = x.bfloat16()
    steps: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: dense(x),
        "csr": lambda: layers["csr"](x),
        "chosen": lambda: layers["chosen"](x),
        "dense_bf16": lambda: layers["dense_bf16"](half),
    }
    if tokens == 1:
        weight, vector = layers["dense_bf16"].weight, half.view(-1)
        steps["dense_bf16_mv"] = lambda: torch.mv(weight, vector)
    return steps


def _check(steps: dict[str, Callable[[], torch.Tensor]]) -> None:
    expected = steps["dense"]()
    for name, step in steps.items():
        error = float((step().float().view_as(expected) - expected).norm() / expected.norm())
        if not error <= TOLERANCE.get(name, 1e-4):
            raise SystemExit(f"No benchmark is reported: {name} differs from dense by {error:.1e} of its norm.")


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each variant, shape and sparsity."""
    rows = []
    for out, columns in QUICK_CASES if args.quick else CASES:
        for sparsity in args.sparsities:
            dense, layers = make_layers(out, columns, sparsity, args.tokens)
            steps = make_steps(dense, layers, args.tokens)
            _check(steps)
            times = runner.interleave(steps, args.rounds, args.device, title=f"{out}x{columns}, {sparsity:.0%}")
            acceleration = acceleration_of(layers["chosen"])
            chosen = "dense" if acceleration is None else acceleration.operands[args.tokens].name
            for variant in steps:
                case = {"out": out, "in": columns, "tokens": args.tokens, "sparsity": sparsity, "variant": variant}
                baselines = {"ratio_dense": "dense", "ratio_bf16": "dense_bf16", "ratio_bf16_mv": "dense_bf16_mv"}
                rows.append(
                    case
                    | times.columns(variant, baselines)
                    | {
                        "speed_up": 1 / times.ratio(variant, "dense"),
                        "chosen": chosen if variant == "chosen" else None,
                    }
                )
    return rows


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=60)
    found.add_argument("--tokens", type=int, default=1, help="multiplied at a time (default: 1)")
    found.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 to 0.95 in seven")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("decode_step", options(), measure))
