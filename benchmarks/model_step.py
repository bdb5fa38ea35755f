"""A language model's whole training step: time and peak memory of LoRA, HiRA, SPP, PST and the authors' formulations,
all linears of the blocks adapted, one sequence, AdamW.

    python -m benchmarks.model_step                       # SmolLM2-135M of `make demo`, 1 x 512 tokens
    python -m benchmarks.model_step --model some/folder   # any causal language model of transformers

Without the demo's model a random Llama of the same size is used; the column `model` says which. Times are interleaved
in one process, which has to hold all models at once: peers that do not fit are left out there, and said so.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import memory, models, runner
from benchmarks.peers import MODEL_PEERS, TRITON_PEERS, authors_of

DEFAULT_PEERS = ("lora", "hira", "spp", "spp_authors", "spp_authors_checkpoint", "pst", "pst_authors")
TOKENS = 512
USABLE = 0.8  # of the memory that is available


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each peer."""
    model, tokens = _model(args), 16 if args.quick else args.tokens
    builders = {peer: partial(models.model_step, peer, model, tokens, args.dtype, args.device) for peer in args.peers}
    peaks: dict[str, memory.Peak | None] = dict.fromkeys(args.peers)
    for peer, build in builders.items() if args.memory else ():
        tiny = partial(models.model_step, peer, models.TINY, 16, args.dtype, args.device)
        peaks[peer] = memory.peak(build, tiny, args.device, args.threads)
        if peaks[peer] is None:
            print(f"{peer}: its process died (out of memory?); the row is without peak memory", file=sys.stderr)
    known = args.memory and args.device.type == "cpu"
    fitting = _that_fit(peaks, memory.available_mb()) if known else list(peaks)
    steps = {peer: builders[peer]() for peer in fitting}
    tensors = {peer: memory.tensor_peak(step, args.device) for peer, step in steps.items()}
    times = runner.interleave(steps, args.rounds, args.device, title=models.describe(model))
    return [
        {"model": models.describe(model), "tokens": tokens, "peer": peer}
        | times.columns(
            peer,
            {
                "ratio_lora": "lora",
                "ratio_hira": "hira",
                "ratio_authors": authors_of(peer) or "",
                "ratio_authors_checkpoint": f"{authors_of(peer)}_checkpoint",
            },
        )
        | {"peak_tensors_mb": tensors[peer]}
        | _memory_columns(peer, peaks)
        | {"saved_mb": step.saved_bytes() / memory.MB, "trainable": step.trainable()}
        for peer, step in steps.items()
    ]


def _model(args: argparse.Namespace) -> Path | dict[str, int]:
    if args.quick:
        return models.TINY
    if args.model is None:
        return models.DEMO_MODEL if models.DEMO_MODEL.is_dir() else models.SMOLLM2_135M
    if not args.model.is_dir():
        raise SystemExit(f"--model is a folder that transformers reads, got {args.model}, which is none.")
    return args.model


def _memory_columns(peer: str, peaks: dict[str, memory.Peak | None]) -> runner.Row:
    """Peak of the step and of model and step together, and both relative to LoRA."""
    own, lora = peaks[peer], peaks.get("lora")
    found: runner.Row = {
        "peak_step_mb": own and own.step,
        "peak_total_mb": own and own.built + own.step,
        "peak_step_ratio_lora": None,
        "peak_total_ratio_lora": None,
    }
    if own and lora and lora.step:
        found["peak_step_ratio_lora"] = own.step / lora.step
        found["peak_total_ratio_lora"] = (own.built + own.step) / (lora.built + lora.step)
    return found


def _that_fit(peaks: dict[str, memory.Peak | None], available: float | None) -> list[str]:
    """Peers whose models can be in one process, in order: their models add up, their steps take turns."""
    fitting, built, step = [], 0.0, 0.0
    for peer, peak in peaks.items():
        if peak is None:
            continue
        # optimizer state stays too: counting a third of each step's peak for it is more than adapters need
        most = max(step, peak.step)
        if available is not None and built + peak.built + peak.step / 3 + most > USABLE * available:
            print(f"{peer}: left out, its model does not fit beside the others'", file=sys.stderr)
            continue
        fitting.append(peer)
        built, step = built + peak.built + peak.step / 3, most
    return fitting


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=10)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument("--tokens", type=int, default=TOKENS, help=f"length of the one sequence (default: {TOKENS})")
    found.add_argument(
        "--peers",
        nargs="+",
        choices=MODEL_PEERS + TRITON_PEERS,
        default=DEFAULT_PEERS,
        help=f"default: {' '.join(DEFAULT_PEERS)}",
    )
    return found


if __name__ == "__main__":
    sys.exit(runner.main("model_step", options(), measure))
