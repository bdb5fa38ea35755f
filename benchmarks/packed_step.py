"""SPP's training step on a packed base against the same step on the dense base with zeros: time, resident bytes of the
weights, peak of tensors, and the loss, which has to be the same.

    python -m benchmarks.packed_step                       # SmolLM2-135M of `make demo`, 1 x 512 tokens
    python -m benchmarks.packed_step --model some/folder --dtype bfloat16

Magnitude pruned at 50, 75 and 90%, and 2:4, all linears of the blocks. Nothing is reported if the losses differ.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from benchmarks import memory, models, runner
from benchmarks.model_step import TOKENS, _model
from benchmarks.peers import RANK, TrainingStep
from peft_sparse import SppConfig, pack_model
from peft_sparse.linears import PackedLinear, block_linears, stored_weight, unwrap

CASES = ("0.5", "0.75", "0.9", "2:4")
LOSS_TOLERANCE = 1e-4  # relative; above it the two do not compute the same


def build_step(
    case: str, packed: bool, model: Path | dict[str, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> TrainingStep:
    """The step of a pruned model, see [`models.model_step`].

    Args:
        case: see [`models.prune`].
        packed: whether the base is packed.
    """
    loaded = models.prune(models.load(model, dtype, device), case)
    if packed:
        pack_model(loaded)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, loaded.config.vocab_size, (1, tokens), generator=generator).to(device)
    torch.manual_seed(0)  # the factors start at random
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(loaded, SppConfig(r=RANK)).train()
    return TrainingStep("spp", adapted, (ids,), lambda: adapted(input_ids=ids, labels=ids, use_cache=False).loss)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that the weights of the blocks' linears take, all that is kept for them included, and those of the largest
    one when it is dense."""
    total, largest = 0, 0
    for linear in map(unwrap, block_linears(model).values()):
        weight = stored_weight(linear)
        parts = (weight.values, weight.bitmask, weight.starts) if isinstance(linear, PackedLinear) else (weight,)
        total += sum(part.numel() * part.element_size() for part in parts)
        largest = max(largest, weight.shape[0] * weight.shape[1] * parts[0].element_size())
    return total, largest


def measure(args: argparse.Namespace) -> list[runner.Row]:
    """Two rows for each case."""
    model, tokens = _model(args), 16 if args.quick else args.tokens
    return [row for case in args.cases for row in _rows(case, model, tokens, args)]


def _rows(case: str, model: Path | dict[str, int], tokens: int, args: argparse.Namespace) -> list[runner.Row]:
    steps = {
        variant: build_step(case, variant == "packed", model, tokens, args.dtype, args.device)
        for variant in ("dense", "packed")
    }
    losses = {variant: step.forward().item() for variant, step in steps.items()}
    if not abs(losses["packed"] - losses["dense"]) <= LOSS_TOLERANCE * losses["dense"]:
        raise SystemExit(f"No benchmark is reported: the losses differ, {losses}.")
    sizes = {variant: weight_bytes(step.model.base_model.model) for variant, step in steps.items()}
    tensors = {variant: memory.tensor_peak(step, args.device) for variant, step in steps.items()}
    # the steps of the line above were warm-up
    times = runner.interleave(steps, args.rounds, args.device, title=case, warmup=1)
    return [
        {"model": models.describe(model), "tokens": tokens, "sparsity": case, "variant": variant}
        | times.columns(variant, {"ratio_dense": "dense"})
        | {
            "weights_mb": sizes[variant][0] / memory.MB,
            "weights_ratio_dense": sizes[variant][0] / sizes["dense"][0],
            "largest_layer_mb": sizes[variant][1] / memory.MB,
            "peak_tensors_mb": tensors[variant],
            "loss": losses[variant],
        }
        for variant in steps
    ]


def options() -> argparse.ArgumentParser:
    found = runner.parser(__doc__, rounds=8)
    found.add_argument("--model", type=Path, default=None, help="transformers folder (default: the demo's SmolLM2)")
    found.add_argument("--tokens", type=int, default=TOKENS, help=f"length of the one sequence (default: {TOKENS})")
    found.add_argument("--cases", nargs="+", default=CASES, help=f"sparsities or N:M (default: {' '.join(CASES)})")
    return found


if __name__ == "__main__":
    sys.exit(runner.main("packed_step", options(), measure))
