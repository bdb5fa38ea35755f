"""The parts of the leaderboard, their budgets and default models."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from benchmarks import check_pruning, models
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
# Of a small budget: at a rate that is good for pretrained weights a head may learn little in so few steps.
HEAD_RATE = 1.5e-3
CLASSES: dict[str, type[Part]] = {"causal-lm": CausalLm, "encoders": Encoders, "nlg": Nlg}
PARTS = tuple(BUDGETS)
BUDGET_NAMES = ("smoke", "small", "full")


class Board(NamedTuple):
    """A part on a model.

    Attributes:
        model: a name of [`find_model`].
        cases: without `--cases`; None: all of the part.
        small: what its small budget has instead of the part's, for a model that two cores take hours for.
    """

    part: str
    model: str
    cases: tuple[str, ...] | None = None
    small: Mapping[str, int] = MappingProxyType({})


# What the command makes when it is not told less.
BOARDS = (
    Board("causal-lm", "stories260k-llama"),
    Board("causal-lm", "smollm2-135m", ("wanda 2:4", "wanda 75%"), {"steps": 50, "tries": 3}),
    Board("encoders", "minilm"),
    Board("encoders", "minilm-roberta", ("sst2 90%",)),
    Board("nlg", "gpt2-byte-shakespeare"),
)


def make(args: argparse.Namespace, store: Store) -> list[tuple[Part, tuple[str, ...] | None]]:
    """The parts that the command line asks for, each with its cases.

    Raises:
        SystemExit: if a model or the data are not there, one model is asked for more than one part, or a rate of the
            head for a part without.
    """
    if not args.data.is_dir():
        raise SystemExit(f"--data is a folder laid out as shared/data, got {args.data}, which is none.")
    if args.model is not None and len(args.part) > 1:
        raise SystemExit(f"--model is for one part, got {len(args.part)} of them; name it with --part.")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch sees, got none; leave it out to run on the CPU.")
    boards = [board for board in BOARDS if board.part in args.part]
    if args.model is not None:
        named = [board for board in boards if board.model == args.model]
        boards = named or [Board(args.part[0], args.model)]
    found: list[tuple[Part, tuple[str, ...] | None]] = []
    for part, model, cases, small in boards:
        if args.head_rate is not None and not CLASSES[part].heads:
            raise SystemExit(
                f"--head-rate is for a part whose models get a new head, got {part}; use --part encoders."
            )
        given = {"steps": args.steps, "tries": args.tries, "head_rate": args.head_rate}
        if args.budget == "small":
            own = {**small, "head_rate": HEAD_RATE if CLASSES[part].heads else None}
            given = {name: own.get(name) if value is None else value for name, value in given.items()}
        budget = BUDGETS[part][args.budget].change(**given)
        folder, label = find_model(model, store)
        made = CLASSES[part](folder, args.data, store, budget, device, label)
        found.append((made, cases if args.cases is None else tuple(args.cases)))
    return found


def find_model(name: str, store: Store) -> tuple[Path, str]:
    """A model's folder, and its name in tables.

    Args:
        name: a model of `shared/models`, "minilm" or "minilm-roberta", "smollm2-135m", or a folder.
    """
    if name == "minilm":
        return minilm(), name
    if name == "minilm-roberta":
        with store.claim(name, wait=True):
            return relabel_as_roberta(minilm(), store.checkpoints / name), name
    if name == "smollm2-135m":
        if not models.DEMO_MODEL.is_dir():
            raise SystemExit(f"The model {name} is where `make demo` leaves it, which was not run; or leave it out.")
        return models.DEMO_MODEL, name
    shared = check_pruning.SHARED / "models" / name
    folder = shared if shared.is_dir() else Path(name)
    if not folder.is_dir():
        raise SystemExit(f"--model is a name that a part knows or a folder that transformers reads, got {name!r}.")
    return folder, folder.name
