"""The gate of pruning_step: ours and the authors' algorithms prune alike, and as the authors' code did where its
numbers are at hand, or nothing is timed.

    python -m benchmarks.check_pruning
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import pruning_layers as layers

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PEFT_SPARSE_SHARED") or REPOSITORY.parent / "shared")
SHAPES = ((40, 64), (33, 300))  # (out, in)
# Of the largest number of a weight. Ours has no inverse of the Hessian and one rounding less.
TOLERANCE = 1e-4

Case = tuple[str, torch.Tensor, list[torch.Tensor], str, float, str, torch.Tensor | None]


def failure() -> str | None:
    """What is wrong, in words; None if all is as it should be."""
    try:
        check()
    except AssertionError as error:
        return str(error)
    return None


def check() -> int:
    """Compare everything; how many results of the authors' code were among it.

    Raises:
        AssertionError: if one differs.
    """
    recorded = 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, weight, batches, pattern, sparsity, method, expected in (*_random_cases(), *_recorded_cases()):
            found = {
                peer: _prune(layers.layer_step(peer, method, pattern, sparsity, match_authors=True), weight, batches)
                for peer in layers.PEERS
            }
            if expected is not None:
                found["recorded"], recorded = expected, recorded + 1
            reference = found.pop("authors")
            for peer, result in found.items():
                what = f"{name}: {method} {pattern} {sparsity:g}, {peer}"
                assert torch.equal(result == 0, reference == 0), f"{what}: other zeros than the authors' algorithm"
                difference = ((result - reference).abs().max() / reference.abs().max()).item()
                assert difference <= TOLERANCE, f"{what}: differs by {difference:.1e}, more than {TOLERANCE:.0e}"
    return recorded


def _prune(
    step: Callable[[nn.Linear, list[torch.Tensor]], None], weight: torch.Tensor, batches: list[torch.Tensor]
) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    step(linear, batches)
    return linear.weight.data


def _random_cases() -> Iterator[Case]:
    for out, width in SHAPES:
        weight, mix = torch.randn(out, width), torch.randn(width, width)
        batches = [torch.randn(2, 200, width) @ mix for _ in range(3)]
        for method in layers.METHODS:
            for pattern, sparsity in (("unstructured", 0.5), ("unstructured", 0.75), ("2:4", 0.5)):
                yield "random layer", weight, batches, pattern, sparsity, method, None


def _recorded_cases() -> Iterator[Case]:
    folder = SHARED / "oracles"
    if not (folder / "oracles.json").exists():
        return
    tensors = load_file(folder / "oracles.safetensors")
    for case in json.loads((folder / "oracles.json").read_text())["prune"]:
        prefix = case["prefix"]
        batches = [tensors[f"{prefix}x{index}"] for index in range(case["batches"])]
        for key, expected in tensors.items():
            match = re.fullmatch(rf"{re.escape(prefix)}(\w+)\.(unstructured(\d+)|\d+:\d+)", key)
            if match and match[1] in layers.METHODS:
                pattern = "unstructured" if match[3] else match[2]
                sparsity = int(match[3]) / 100 if match[3] else 0.5
                yield prefix, tensors[f"{prefix}weight"], batches, pattern, sparsity, match[1], expected


if __name__ == "__main__":
    try:
        print(f"Both prune alike; {check()} results of the authors' code were compared.")
    except AssertionError as error:
        sys.exit(str(error))
