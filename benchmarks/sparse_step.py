"""One SPP layer's training step as the weight gets sparser: over the dense weight, over its non-zeros alone, and as
the package chooses between the two; beside the three dense matmuls and LoRA.

    python -m benchmarks.sparse_step          # 2048 x 2048, 1024 tokens, and SmolLM2-135M's widest layer
    python -m benchmarks.sparse_step --all    # more sizes
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import runner
from benchmarks.peers import layer_step

VARIANTS = ("floor", "lora", "spp_dense", "spp_csr", "spp")
SPARSITIES = (0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
CASES = ((2048, 2048, 1024), (1536, 576, 512))  # (out, in, tokens)
MORE_CASES = ((1024, 1024, 1024), (4096, 4096, 256), (11008, 4096, 256))
QUICK_CASES = ((64, 48, 16),)


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """A row for each variant, case and sparsity."""
    cases = QUICK_CASES if args.quick else CASES + (MORE_CASES if args.all else ())
    rows = []
    for out, columns, tokens in cases:
        for sparsity in args.sparsities:
            steps = {
                variant: layer_step(variant, out, columns, tokens, args.dtype, args.device, sparsity)
                for variant in VARIANTS
            }
            title = f"{out}x{columns}, {tokens} tokens, {sparsity:.0%}"
            times = runner.interleave(steps, args.rounds, args.device, title=title)
            for variant in steps:
                case = {"out": out, "in": columns, "tokens": tokens, "sparsity": sparsity, "variant": variant}
                baselines = {"ratio_floor": "floor", "ratio_lora": "lora", "ratio_dense": "spp_dense"}
                rows.append(case | times.columns(variant, baselines))
    return rows


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=10)
    found.add_argument("--all", action="store_true", help="1024, 4096 square and 11008 x 4096 too")
    found.add_argument(
        "--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 to 0.99 in eight steps"
    )
    return found


if __name__ == "__main__":
    sys.exit(runner.main("sparse_step", options(), measure))
