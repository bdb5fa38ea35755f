"""One linear layer's training step (forward, backward, AdamW): ours, PEFT's LoRA and HiRA, full fine-tuning, the
authors' formulations, our plain reference, and the floor that no dense method can be below.

    python -m benchmarks.layer_step          # 2048 x 2048, 1024 tokens
    python -m benchmarks.layer_step --all    # four sizes, three numbers of tokens
    python -m benchmarks.layer_step --device cuda --dtype bfloat16 --peers floor lora spp spp_triton pst pst_triton
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from benchmarks import memory, runner
from benchmarks.peers import LAYER_PEERS, TRITON_PEERS, TrainingStep, authors_of, layer_step

SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096))  # (out, in)
TOKENS = (256, 1024, 4096)
DEFAULT_CASE = (2048, 2048, 1024)
QUICK_CASE = (64, 48, 16)


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each peer and case."""
    if args.all and not args.quick:
        cases = [(*shape, tokens) for shape in SHAPES for tokens in TOKENS]
    else:
        cases = [QUICK_CASE if args.quick else (args.out_features, args.in_features, args.tokens)]
    return [row for case in cases for row in _measure_case(case, args)]


def _measure_case(case: tuple[int, int, int], args: argparse.Namespace) -> list[runner.Row]:
    out, columns, tokens = case
    builders = {peer: partial(layer_step, peer, *case, args.dtype, args.device) for peer in args.peers}
    peaks: dict[str, memory.Peak | None] = dict.fromkeys(args.peers)
    if args.memory:
        for peer, build in builders.items():
            tiny = partial(layer_step, peer, *QUICK_CASE, args.dtype, args.device)
            peaks[peer] = memory.peak(build, tiny, args.device, args.threads)
    steps = {peer: build() for peer, build in builders.items()}
    tensors = {peer: memory.tensor_peak(step, args.device) for peer, step in steps.items()}
    times = runner.interleave(steps, args.rounds, args.device, title=f"{out}x{columns}, {tokens} tokens")
    rows = []
    for peer, step in steps.items():
        trains, peak = isinstance(step, TrainingStep), peaks[peer]
        baselines = {"ratio_floor": "floor", "ratio_lora": "lora", "ratio_hira": "hira"}
        baselines["ratio_authors"] = authors_of(peer) or ""
        baselines["ratio_authors_checkpoint"] = f"{authors_of(peer)}_checkpoint"
        rows.append(
            {"out": out, "in": columns, "tokens": tokens, "peer": peer}
            | times.columns(peer, baselines)
            | {
                "saved_bytes_beyond_x": step.saved_bytes() if trains else None,
                "saved_bytes_per_weight": step.saved_bytes() / (out * columns) if trains else None,
                "peak_tensors_mb": tensors[peer],
                "peak_step_mb": None if peak is None else peak.step,
                "trainable": step.trainable() if trains else None,
            }
        )
    return rows


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__)
    found.add_argument("--all", action="store_true", help="the grid of all sizes and numbers of tokens")
    out, columns, tokens = DEFAULT_CASE
    found.add_argument("--out-features", type=int, default=out, help=f"of the one case (default: {out})")
    found.add_argument("--in-features", type=int, default=columns, help=f"of the one case (default: {columns})")
    found.add_argument("--tokens", type=int, default=tokens, help=f"of the one case (default: {tokens})")
    found.add_argument(
        "--peers",
        nargs="+",
        choices=LAYER_PEERS + TRITON_PEERS,
        default=LAYER_PEERS,
        help=f"default: all but {' and '.join(TRITON_PEERS)}, which need --device cuda",
    )
    return found


if __name__ == "__main__":
    sys.exit(runner.main("layer_step", options(), measure))
