"""Pruning layers, given their inputs: Wanda and SparseGPT, ours and the authors' algorithms, statistics and zeros.

    python -m benchmarks.pruning_step          # one layer of 2048 x 2048; the seven linears of a block of SmolLM2-135M
    python -m benchmarks.pruning_step --all    # also 1024, 4096 square and 11008 x 4096

Both prune the same dense weights with the same batches, each batch one sequence, as a model's forward hands them out:
in a block q, k and v get one tensor, gate and up another. No forward pass is in the time. Before anything is timed,
both are compared with each other and with the authors' numbers (check_pruning.py).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from torch import nn

from benchmarks import check_pruning, memory, runner
from benchmarks.models import SMOLLM2_135M
from benchmarks.pruning_layers import METHODS, PEERS, Layers, PruningStep

SETTINGS = (("unstructured", 0.5), ("2:4", 0.5), ("4:8", 0.5))
SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))  # (out, in), beside the default
DEFAULT_SHAPE = (2048, 2048)
QUICK_SHAPE = (48, 32)
SEQUENCES, TOKENS = 8, 512
QUICK_INPUTS = (2, 8)


def block_shapes(config: dict[str, int]) -> dict[str, tuple[int, int, str]]:
    """Linears of a Llama block: (out, in) and which input they get, so that equal ones get the same tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "q": (hidden, hidden, "attention"),
        "k": (keys, hidden, "attention"),
        "v": (keys, hidden, "attention"),
        "o": (hidden, hidden, "heads"),
        "gate": (inner, hidden, "mlp"),
        "up": (inner, hidden, "mlp"),
        "down": (hidden, inner, "inner"),
    }


def make_layers(
    shapes: dict[str, tuple[int, int, str]], sequences: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Layers:
    """Random linears with random inputs, whose columns differ in size and resemble each other."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, list[torch.Tensor]] = {}
    for _, width, which in shapes.values():
        if which not in inputs:
            mix = torch.randn(width // 4, width, generator=generator) * torch.rand(width, generator=generator)
            inputs[which] = [
                (torch.randn(1, tokens, width // 4, generator=generator) @ mix).to(device, dtype)
                + torch.randn(1, tokens, width, generator=generator).to(device, dtype)
                for _ in range(sequences)
            ]
    layers = {}
    for name, (out, width, which) in shapes.items():
        linear = nn.Linear(width, out, bias=False, device=device, dtype=dtype)
        linear.weight.data = torch.randn(out, width, generator=generator).to(device, dtype)
        layers[name] = (linear, inputs[which])
    return layers


def build(
    peer: str,
    method: str,
    setting: tuple[str, float],
    shapes: dict[str, tuple[int, int, str]],
    inputs: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> PruningStep:
    """A step with layers of its own; picklable arguments, for a process of its own."""
    return PruningStep(peer, method, *setting, make_layers(shapes, *inputs, dtype, device))


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """Two rows for each case, method and pattern.

    Raises:
        SystemExit: if the algorithms do not prune alike.
    """
    wrong = check_pruning.failure()
    if wrong:
        raise SystemExit(f"No benchmark is reported: ours and the authors' algorithm prune differently.\n{wrong}")
    cases = {f"layer {out}x{width}": {"layer": (out, width, "x")} for out, width in _layer_shapes(args)}
    if not args.quick:
        cases["block of SmolLM2-135M"] = block_shapes(SMOLLM2_135M)
    return [
        row
        for case, shapes in cases.items()
        for method in args.methods
        for setting in SETTINGS
        if setting[0] in args.patterns
        for row in _measure_case(case, shapes, method, setting, args)
    ]


def _layer_shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    if args.quick:
        return [QUICK_SHAPE]
    return [DEFAULT_SHAPE, *(SHAPES if args.all else ())]


def _measure_case(
    case: str,
    shapes: dict[str, tuple[int, int, str]],
    method: str,
    setting: tuple[str, float],
    args: argparse.Namespace,
) -> list[runner.Row]:
    inputs = QUICK_INPUTS if args.quick else (args.sequences, args.tokens)
    builders = {peer: partial(build, peer, method, setting, shapes, inputs, args.dtype, args.device) for peer in PEERS}
    peaks: dict[str, memory.Peak | None] = dict.fromkeys(PEERS)
    if args.memory:
        tiny = {"layer": (*QUICK_SHAPE, "x")}
        for peer, builder in builders.items():
            warm_up = partial(build, peer, method, setting, tiny, QUICK_INPUTS, args.dtype, args.device)
            peaks[peer] = memory.peak(builder, warm_up, args.device, args.threads)
    layers = make_layers(shapes, *inputs, args.dtype, args.device)  # the same for both, which take turns
    steps = {peer: PruningStep(peer, method, *setting, layers) for peer in PEERS}
    tensors = {peer: memory.tensor_peak(step, args.device) for peer, step in steps.items()}
    times = runner.interleave(
        steps, args.rounds, args.device, title=f"{case}, {method} {setting[0]}", warmup=runner.WARMUP_ROUNDS - 2
    )
    return [
        {"case": case, "sequences": inputs[0], "tokens": inputs[1], "method": method, "pattern": setting[0]}
        | {"sparsity": setting[1], "peer": peer}
        | times.columns(peer, {"ratio_authors": "authors"})
        | {"peak_tensors_mb": tensors[peer], "peak_step_mb": (peak := peaks[peer]) and peak.step}
        for peer in PEERS
    ]


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=5)
    found.add_argument("--all", action="store_true", help="more layers")
    found.add_argument("--sequences", type=int, default=SEQUENCES, help=f"batches (default: {SEQUENCES})")
    found.add_argument("--tokens", type=int, default=TOKENS, help=f"length of a sequence (default: {TOKENS})")
    found.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    patterns = [pattern for pattern, _ in SETTINGS]
    found.add_argument("--patterns", nargs="+", choices=patterns, default=patterns, help="default: all")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("pruning_step", options(), measure))
