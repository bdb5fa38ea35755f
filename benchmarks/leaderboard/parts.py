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
from benchmarks.leaderboard.sparsifying import Sparsifying
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


class Board(NamedTuple):
    """A part on a model.

    Attributes:
        model: a name of [`find_model`].
        cases: without `--cases`; None: all of the part.
        small: what its small budget has instead of the part's and of the cases', for a model that two cores take hours
            for.
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


def make(args: argparse.Namespace, store: Store) -> list[tuple[Part, tuple[str, ...]]]:
    """The parts that the command line asks for, each with its cases. A part has one budget: cases with another one are
    a part of their own, with a table of their own.

    Raises:
        SystemExit: if a model, the data or the device are not there, one model is asked for more than one part, or a
            rate of the head for a part without.
    """
    if not args.data.is_dir():
        raise SystemExit(f"--data is a folder laid out as shared/data, got {args.data}, which is none.")
    if args.model is not None and len(args.part) > 1:
        raise SystemExit(f"--model is for one part, got {len(args.part)} of them; name it with --part.")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise SystemExit(f"--device is one that torch knows, such as cpu or cuda, got {args.device}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch sees, got none; leave it out to run on the CPU.")
    boards = [board for board in BOARDS if board.part in args.part]
    if args.model is not None:
        named = [board for board in boards if board.model == args.model]
        boards = named or [Board(args.part[0], args.model)]
    found: list[tuple[Part, tuple[str, ...]]] = []
    for board in boards:
        made = CLASSES[board.part]
        if args.head_rate is not None and not made.heads:
            raise SystemExit(
                f"--head-rate is for a part whose models get a new head, got {board.part}; use --part encoders."
            )
        if args.tuned_first and not issubclass(made, Sparsifying):
            raise SystemExit(
                f"--tuned-first is for a part whose rows make a dense model sparse, got {board.part}; use --part "
                "encoders or nlg."
            )
        folder, label = find_model(board.model, store)
        for budget, cases in _by_budget(board, args).items():
            found.append((made(folder, args.data, store, budget, device, label), tuple(cases)))
    return found


def _by_budget(board: Board, args: argparse.Namespace) -> dict[Budget, list[str]]:
    """The board's cases, those of one budget together."""
    part = CLASSES[board.part]
    given = {name: getattr(args, name) for name in ("steps", "tries", "head_rate", "clip", "tuned_first")}
    given = {name: value for name, value in given.items() if value is not None}
    found: dict[Budget, list[str]] = {}
    for case in args.cases or board.cases or part.all_cases():
        own = {**part.small(case), **board.small} if args.budget == "small" else {}
        if args.tuned_first:  # such a model has learnt its task, and its head is no new one
            own = {name: value for name, value in own.items() if name not in ("steps", "head_rate")}
        found.setdefault(BUDGETS[board.part][args.budget].change(**{**own, **given}), []).append(case)
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
            raise SystemExit(
                f"The model {name} is where `make demo` leaves it, which was not run; run it, or choose other models "
                "with --part and --model."
            )
        return models.DEMO_MODEL, name
    shared = check_pruning.SHARED / "models" / name
    folder = shared if shared.is_dir() else Path(name)
    if not folder.is_dir():
        raise SystemExit(f"--model is a name that a part knows or a folder that transformers reads, got {name!r}.")
    return folder, folder.name
