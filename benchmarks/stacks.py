"""Ways of computing a layer, compared under the same conditions: the shared protocol of the layer benchmarks.

How long a layer takes depends on where its weight is. In a model each layer comes after all the others, and its weight
from memory; called over and over it comes from a cache, as far as it fits. So there are two comparisons, and on a GPU
a third:

- `compare`: a stack of layers of one shape, as many as a model has of it or as caches do not hold. A way computes the
  whole stack once untimed, then timed, so that it finds what it left there itself, not what another way did.
- `compare_cached`: one of the layers, over and over, in the same way.
- `compare_graphs`: the stack as a CUDA graph: the kernels alone, without Python and without their launches.

In each the ways take turns in the order A B C C B A, times are paired round by round, and the dense layers run under a
second name, `CONTROL`: what its ratio is away from 1 is the protocol's own error.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from benchmarks import runner

STACK_BYTES = 1 << 30  # of dense weights: a tenth of it kept, with its columns, still is 215 MB
CALLS = 4  # for one time of a layer whose weight is in a cache
BASELINE, CONTROL = "dense", "control"

Run = Callable[[], object]


def stack_of(out: int, columns: int, args: argparse.Namespace, nbytes: int = STACK_BYTES) -> nn.Sequential:
    """Random linears without bias, each computed by itself: `nbytes` of weights, or two layers with `--quick`."""
    number = 2 if args.quick else -(-nbytes // (out * columns * args.dtype.itemsize))
    options = {"bias": False, "dtype": args.dtype, "device": args.device}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(columns, out, **options) for _ in range(number))).requires_grad_(False)


def twin(layer: nn.Module) -> nn.Module:
    """The same layer once more, with the same weights in the same place, to be accelerated or left as it is."""
    made = copy.copy(layer)
    made.__dict__["_parameters"] = dict(layer._parameters)
    return made


def runs(layers: Sequence[nn.Module], x: torch.Tensor) -> list[Run]:
    """A function for each layer that computes it for `x`."""
    return [lambda layer=layer: layer(x) for layer in layers]


def compare(ways: Mapping[str, Sequence[Run]], args: argparse.Namespace, title: str = "") -> runner.Times:
    """Seconds of a layer, in each way and for `CONTROL`.

    Args:
        ways: name -> a run for each layer of the stack; `BASELINE` is one of them.
    """
    steps = {name: lambda own=tuple(own): [run() for run in own] for name, own in _with_control(ways).items()}
    number = len(ways[BASELINE])
    return runner.interleave(steps, args.rounds, args.device, title, warmup=1, settle=1, count=number)


def compare_cached(ways: Mapping[str, Sequence[Run]], args: argparse.Namespace, title: str = "") -> runner.Times:
    """The same of the first layer alone, whose weight is where its last call left it."""
    steps = {name: lambda run=own[0]: [run() for _ in range(CALLS)] for name, own in _with_control(ways).items()}
    return runner.interleave(steps, args.rounds, args.device, title, warmup=1, settle=1, count=CALLS)


def compare_graphs(ways: Mapping[str, Sequence[Run]], args: argparse.Namespace, title: str = "") -> runner.Times:
    """The same as [`compare`], each way recorded once and replayed."""
    steps = {name: _recorded(own).replay for name, own in _with_control(ways).items()}
    number = len(ways[BASELINE])
    return runner.interleave(steps, args.rounds, args.device, title, warmup=1, settle=1, count=number)


def _recorded(runs: Sequence[Run]) -> torch.cuda.CUDAGraph:
    for run in runs:  # what is compiled or set up at the first use
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def _with_control(ways: Mapping[str, Sequence[Run]]) -> dict[str, Sequence[Run]]:
    return {BASELINE: ways[BASELINE], CONTROL: ways[BASELINE], **ways}
