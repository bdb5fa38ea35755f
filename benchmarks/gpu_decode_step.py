"""A layer and one token on a GPU: the dense layer, 2:4 through torch, values and bitmask in Triton, and what
`accelerate_sparse` chooses among them.

    python -m benchmarks.gpu_decode_step --device cuda --dtype bfloat16
    python -m benchmarks.gpu_decode_step --device cuda --dtype bfloat16 --tokens 64

Magnitude pruned. `ratio_dense` is of calls one after the other, as a model makes them: Python and the launch of a
kernel take longer than the kernels of small layers. `ratio_graph` is of the same calls in a CUDA graph. By the
protocol of `stacks.py`; nothing is reported if a variant computes something else than dense.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from benchmarks import models, runner, stacks
from peft_sparse import accelerate_sparse, ops
from peft_sparse.linears import OPERANDS, acceleration_of

SPARSITIES = ("2:4", "0.5", "0.75", "0.9")
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192))  # (out, in): Llama 2 7B and 70B
QUICK_SHAPES = ((64, 48),)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the norm


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each shape, sparsity and way to compute."""
    with ops.use_triton(args.device.type == "cuda"):
        return [
            row
            for shape in (QUICK_SHAPES if args.quick else args.shapes)
            for sparsity in args.sparsities
            for row in _rows(*shape, sparsity, args)
        ]


def _rows(out: int, columns: int, sparsity: str, args: argparse.Namespace) -> list[runner.Row]:
    dense = stacks.stack_of(out, columns, args)
    models.prune(dense, sparsity, target_modules=[str(place) for place in range(len(dense))])
    x = torch.randn(1, args.tokens, columns, generator=torch.Generator().manual_seed(0)).to(args.device, args.dtype)
    accelerated = _accelerated(dense, args.tokens)
    ways = {"dense": stacks.runs(dense, x)} | {name: stacks.runs(layers, x) for name, layers in accelerated.items()}
    _check(ways, args.dtype)
    times = stacks.compare(ways, args, title=f"{out}x{columns}, {sparsity}")
    graphs = stacks.compare_graphs(ways, args) if args.device.type == "cuda" else None
    acceleration = acceleration_of(accelerated["chosen"][0])
    operand = None if acceleration is None else acceleration.by_tokens(args.tokens)
    return [
        {"out": out, "in": columns, "tokens": args.tokens, "sparsity": sparsity, "variant": variant}
        | times.columns(variant, {"ratio_dense": "dense"})
        | {"ratio_spread": times.ratio_spread(variant, "dense")}
        | {"graph_ms": graphs and graphs.median_ms(variant), "ratio_graph": graphs and graphs.ratio(variant, "dense")}
        | {"chosen": ("dense" if operand is None else operand.name) if variant == "chosen" else None}
        for variant in times.seconds
    ]


def _accelerated(dense: nn.Sequential, tokens: int) -> dict[str, nn.Sequential]:
    """The same layers in each way that they can have for these tokens, and in the chosen one."""
    made = {}
    for name, kind in OPERANDS.items():
        if kind.refusal(dense[0]) is None and not (name == "bitmask" and tokens > 1 and dense[0].weight.is_cuda):
            made[name] = nn.Sequential(*map(stacks.twin, dense))
            accelerate_sparse(made[name], tokens, kernel=name)
    made["chosen"] = nn.Sequential(*map(stacks.twin, dense))
    print(accelerate_sparse(made["chosen"], tokens))
    return made


def _check(ways: dict[str, list[stacks.Run]], dtype: torch.dtype) -> None:
    expected = ways["dense"][0]().float()
    for name, way in ways.items():
        error = float((way[0]().float() - expected).norm() / expected.norm())
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"No benchmark is reported: {name} differs from dense by {error:.1e} of its norm.")


def out_x_in(text: str) -> tuple[int, int]:
    """A shape such as "4096x11008"; ValueError for anything else, of which argparse makes a message."""
    out, columns = map(int, text.split("x"))
    return out, columns


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=20)
    found.add_argument("--tokens", type=int, default=1, help="multiplied at a time (default: 1)")
    default = " ".join(f"{out}x{columns}" for out, columns in SHAPES)
    found.add_argument("--shapes", nargs="+", type=out_x_in, default=SHAPES, help=f"out x in (default: {default})")
    found.add_argument("--sparsities", nargs="+", default=SPARSITIES, help=f"or N:M (default: {' '.join(SPARSITIES)})")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("gpu_decode_step", options(), measure))
