"""The parts of the leaderboard, their budgets and default models."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import check_pruning
from benchmarks.leaderboard.encoders import Encoders, minilm, relabel_as_roberta
from benchmarks.leaderboard.language import CausalLm
from benchmarks.leaderboard.nlg import Nlg
from benchmarks.leaderboard.settings import Budget
from benchmarks.leaderboard.store import Store

Part = CausalLm | Encoders | Nlg

# name, steps, batch_size, length, tries, validation_rows, test_rows
BUDGETS: dict[str, dict[str, Budget]] = {
    "causal-lm": {
        "smoke": Budget("smoke", 6, 2, 16, 2, 4, 8, zeroshot_rows=4, calibration_rows=4),
        "small": Budget("small", 80, 4, 128, 4, 32, 128, zeroshot_rows=100),
        "full": Budget("full", 300, 4, 512, 6, 64, None, zeroshot_rows=None, calibration_rows=128),
    },
    "encoders": {
        "smoke": Budget("smoke", 6, 4, 32, 2, 16, 16),
        "small": Budget("small", 120, 16, 64, 4, 500, None),
        "full": Budget("full", 2000, 32, 128, 6, 1000, None),
    },
    "nlg": {
        "smoke": Budget("smoke", 6, 2, 256, 2, 4, 4),
        "small": Budget("small", 100, 4, 256, 4, 64, 32),
        "full": Budget("full", 2000, 16, 256, 6, 300, None),
    },
}
CLASSES: dict[str, type[Part]] = {"causal-lm": CausalLm, "encoders": Encoders, "nlg": Nlg}
PARTS = tuple(BUDGETS)
BUDGET_NAMES = ("smoke", "small", "full")
ROBERTA = "minilm-roberta"  # the name of MiniLM's relabelling, for --model


def make(args: argparse.Namespace, store: Store) -> list[Part]:
    """The parts that the command line asks for.

    Raises:
        SystemExit: if a model or the data are not there, or one model is asked for more than one part.
    """
    if not args.data.is_dir():
        raise SystemExit(f"--data is a folder laid out as shared/data, got {args.data}, which is none.")
    if args.model is not None and len(args.part) > 1:
        raise SystemExit(f"--model is for one part, got {len(args.part)} of them; name it with --part.")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch sees, got none; leave it out to run on the CPU.")
    found: list[Part] = []
    for name in args.part:
        budget = BUDGETS[name][args.budget].change(steps=args.steps, tries=args.tries)
        folder, label = _folder(name, args.model, store)
        found.append(CLASSES[name](folder, args.data, store, budget, device, label))
    return found


def _folder(part: str, given: str | None, store: Store) -> tuple[Path, str | None]:
    """A part's model, and its name where the folder's says nothing."""
    if part == "encoders" and given is None:
        return minilm(), "minilm"
    if part == "encoders" and given == ROBERTA:
        with store.claim(ROBERTA, wait=True):
            return relabel_as_roberta(minilm(), store.checkpoints / ROBERTA), None
    defaults = {"causal-lm": "stories260k-llama", "nlg": "gpt2-byte-shakespeare"}
    folder = check_pruning.SHARED / "models" / defaults[part] if given is None else Path(given)
    if not folder.is_dir():
        raise SystemExit(f"--model is a folder that transformers reads, got {folder}, which is none.")
    return folder, None
