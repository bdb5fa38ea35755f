"""generate() of a pruned model, whole call: as it is, and after `accelerate_sparse`; greedy, batch 1.

    python -m benchmarks.generate                          # SmolLM2-135M of `make demo`, 64 new tokens
    python -m benchmarks.generate --prompt 256 --append

Magnitude pruned, all linears of the blocks. Rows: `dense`, and `accelerated`, where all layers hold what
`accelerate_sparse` chose. `packed` gave up the dense weights (`keep_dense=False`). Nothing is reported if the logits
of the prompt differ.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import memory, models, runner
from benchmarks.model_step import _model
from peft_sparse import accelerate_sparse, prune_magnitude

SPARSITIES = (0.5, 0.75, 0.9, 0.95)
PROMPT, NEW_TOKENS = 16, 64
LOGITS_TOLERANCE = 1e-3  # of their norm


def generate(model: nn.Module, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The whole call: prompt and new tokens, no early end."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """Three rows for each sparsity."""
    model = _model(args)
    prompt, new_tokens = (4, 3) if args.quick else (args.prompt, args.new_tokens)
    return [row for sparsity in args.sparsities for row in _rows(sparsity, model, prompt, new_tokens, args)]


@torch.no_grad()
def _rows(
    sparsity: float, model: Path | dict[str, int], prompt: int, new_tokens: int, args: argparse.Namespace
) -> list[runner.Row]:
    dense = prune_magnitude(models.load(model, args.dtype, args.device), sparsity=sparsity).eval()
    variants = {"dense": dense, "accelerated": copy.deepcopy(dense), "packed": copy.deepcopy(dense)}
    reports = {
        "accelerated": accelerate_sparse(variants["accelerated"]),
        "packed": accelerate_sparse(variants["packed"], keep_dense=False),
    }
    for name, report in reports.items():
        print(f"{sparsity:.0%} zeros, {name}:\n{report}")
    ids = torch.randint(3, dense.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(args.device)
    expected = dense(ids).logits.float()
    for name, variant in variants.items():
        error = float((variant(ids).logits.float() - expected).norm() / expected.norm())
        if not error <= LOGITS_TOLERANCE:
            raise SystemExit(f"No benchmark is reported: the logits of {name} differ by {error:.1e} of their norm.")
    texts = {name: generate(variant, ids, new_tokens)[0, prompt:] for name, variant in variants.items()}
    steps = {name: partial(generate, variant, ids, new_tokens) for name, variant in variants.items()}
    times = runner.interleave(steps, args.rounds, args.device, title=f"{sparsity:.0%}", warmup=1)
    rows = []
    for name in variants:
        report = reports.get(name)
        nbytes = reports["accelerated"].weight_bytes if report is None else report.weight_bytes + report.added_bytes
        rows.append(
            {"model": models.describe(model), "tokens": prompt, "new_tokens": new_tokens, "sparsity": sparsity}
            | {"variant": name}
            | times.columns(name, {"ratio_dense": "dense"})
            | {
                "speed_up": 1 / times.ratio(name, "dense"),
                "layers_accelerated": 0 if report is None else len(report.accelerated),
                "layers": len(reports["accelerated"].layers),
                "linears_mb": nbytes / memory.MB,
                "same_tokens": float((texts[name] == texts["dense"]).float().mean()),
            }
        )
    return rows


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=5)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument("--prompt", type=int, default=PROMPT, help=f"tokens in the prompt (default: {PROMPT})")
    found.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help=f"to generate (default: {NEW_TOKENS})")
    found.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="default: 0.5 0.75 0.9 0.95")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("generate", options(), measure))
