"""Training step of a small Llama with SPP and with PST: eager against `torch.compile(model, fullgraph=True)`.

    python -m benchmarks.compile_step

On a CPU, inductor needs a C++ compiler; without one nothing is measured. The first compiled step, which compiles, is
timed on its own (column first_step_s); compiled and eager losses are compared before anything is reported.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

import torch

from benchmarks import models, runner

METHODS = ("spp", "pst")
TOKENS = 256
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 5e-2}


def compiler_missing(backend: str, device: torch.device) -> bool:
    """Whether the backend needs a C++ compiler and there is none."""
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return backend == "inductor" and device.type == "cpu" and not found


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """Two rows for each method."""
    if compiler_missing(args.backend, args.device):
        print("Nothing is measured: inductor's CPU backend needs a C++ compiler (g++, clang++); none is on PATH.")
        return []
    size, tokens = (models.TINY, 16) if args.quick else (models.SMALL, args.tokens)
    torch._dynamo.reset()
    steps, first, losses = {}, {}, {}
    for method in METHODS:
        for kind, backend in (("eager", None), ("compiled", args.backend)):
            name = f"{method}_{kind}"
            steps[name] = models.model_step(method, size, tokens, args.dtype, args.device, backend)
            start = time.perf_counter()
            steps[name]()
            first[name] = time.perf_counter() - start
            losses[name] = steps[name].forward().item()
        _compare(method, losses, LOSS_TOLERANCE[args.dtype])
    times = runner.interleave(steps, args.rounds, args.device, title="eager and compiled")
    return [
        {"model": models.describe(size), "tokens": tokens, "backend": args.backend, "variant": name}
        | times.columns(name, {"ratio_eager": f"{name.partition('_')[0]}_eager"})
        | {"first_step_s": first[name], "loss_after_first_step": losses[name]}
        for name in steps
    ]


def _compare(method: str, losses: dict[str, float], tolerance: float) -> None:
    eager, compiled = losses[f"{method}_eager"], losses[f"{method}_compiled"]
    if not abs(eager - compiled) <= tolerance * abs(eager):
        raise SystemExit(f"{method}: the compiled loss {compiled} is not the eager one, {eager}; nothing is reported.")


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__)
    found.add_argument("--tokens", type=int, default=TOKENS, help=f"length of the one sequence (default: {TOKENS})")
    found.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("compile_step", options(), measure))
