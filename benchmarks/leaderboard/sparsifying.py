"""What encoders and NLG have in common: a dense model that becomes sparse while it is tuned, and one run of a row.

A case is a task and a sparsity, "sst2 90%". The part of the training data that a learning rate is chosen on is drawn
once, the same for every row; the test set is read by the final runs alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from benchmarks.leaderboard import methods, pst_methods, training
from benchmarks.leaderboard.plan import Line
from benchmarks.leaderboard.pst_methods import ALL, METHODS, Setup
from benchmarks.leaderboard.search import Rates, rounded
from benchmarks.leaderboard.settings import FINAL, SEARCH_SEED, Budget, Trial
from benchmarks.leaderboard.store import Store, save_complete
from benchmarks.leaderboard.tuned import with_head_rate
from peft_sparse import distill, verify_sparsity

SPLIT_SEED = 7


class Sparsifying:
    """A part whose rows are those of [`pst_methods`]. Subclasses say what the tasks are and how a model is
    measured."""

    name = ""
    metric, better = "score", "higher"
    tasks: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    task_type = ""
    ours = pst_methods.OURS
    rivals = pst_methods.RIVALS
    titles: Mapping[str, str] = {name: method.title for name, method in ALL.items()}
    sparsities = ("50%", "90%")
    rate_scale = 1.0  # of all first learning rates, where the model takes higher ones than a BERT

    def __init__(
        self, folder: Path, data: Path, store: Store, budget: Budget, device: torch.device, label: str | None = None
    ) -> None:
        self.folder, self.data, self.store, self.budget, self.device = folder, data, store, budget, device
        self.model = folder.name if label is None else label
        logging.disable_progress_bar()  # of each load

    # What a subclass defines

    def load(self, task: str, folder: Path | None = None) -> nn.Module:
        """The model in a folder, on the device; None: the pretrained one."""
        raise NotImplementedError

    def num_train(self, task: str) -> int:
        """Training examples, without the validation part."""
        raise NotImplementedError

    def collate(self, task: str, indices: list[int]) -> training.Batch:
        """A training batch."""
        raise NotImplementedError

    def measure(self, task: str, model: nn.Module, final: bool) -> dict[str, float]:
        """At least `score`, lower is better; of the validation part, or of the test set for a final run."""
        raise NotImplementedError

    @classmethod
    def small(cls, case: str) -> Mapping[str, float]:
        """What the small budget of a case has instead of the part's."""
        return {}

    # The rest

    @classmethod
    def all_cases(cls) -> tuple[str, ...]:
        """Those of the whole table."""
        return tuple(f"{task} {share}" for task in cls.tasks for share in cls.sparsities)

    def lines(self, cases: Sequence[str], rows: list[str] | None, seeds: tuple[int, ...]) -> list[Line]:
        """The rows of all cases; dense fine-tuning first, once for each task.

        Raises:
            SystemExit: for a case or a row that there is not.
        """
        if rows is None:
            rows = [row for row in ALL if row in METHODS or (ALL[row].tuned_first and self.budget.tuned_first)]
        for case in cases:
            if self._task(case) not in self.tasks or not 0 < self._sparsity(case) < 1:
                raise SystemExit(f"A case is one of {list(self.tasks)} and a sparsity such as 90%, got {case!r}.")
        for row in rows:
            if row not in ALL:
                raise SystemExit(f"A row of {self.name} is one of {list(ALL)}, got {row!r}.")
            if ALL[row].tuned_first and not self.budget.tuned_first:
                raise SystemExit(f"The row {row} is one of a dense model that was tuned; give --tuned-first STEPS.")
        tasks = dict.fromkeys(self._task(case) for case in cases)
        pairs = [(f"{task} dense", row) for task in tasks for row in rows if ALL[row].dense]
        pairs += [(case, row) for case in cases for row in rows if not ALL[row].dense]
        return [
            Line(self.name, self.model, case, row, self.start(self._task(case), row), seeds, self.budget)
            for case, row in pairs
        ]

    def start(self, task: str, row: str) -> Rates:
        """The first learning rates to try."""
        return tuple(rounded(rate * self.rate_scale) for rate in ALL[row].start)

    @staticmethod
    def _task(case: str) -> str:
        return case.partition(" ")[0]

    @staticmethod
    def _sparsity(case: str) -> float:
        """Share of zeros that a case asks for; 0 for "dense", NaN for what is no share."""
        share = case.partition(" ")[2]
        if share == "dense":
            return 0.0
        try:
            return float(share.removesuffix("%")) / 100
        except ValueError:
            return float("nan")

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train, merge, verify and measure."""
        task, method, final = self._task(trial.case), ALL[trial.row], trial.stage == FINAL
        start = self._tuned_first(task) if self.budget.tuned_first else None
        set_seed(trial.seed)  # before the model: its head starts at random
        model = self.load(task, start)
        found: dict[str, Any] = {"fingerprint": methods.fingerprint(model)}
        if method.adapt is None:
            return found | {"sparsity": methods.sparsity(model)} | self.measure(task, model.eval(), final)
        tuned = method.adapt(model, Setup(self._sparsity(trial.case), self.heads, self.task_type))
        if self.budget.head_rate:
            tuned = with_head_rate(tuned, self.heads, self.budget.head_rate)
        found["trainable"] = sum(parameter.numel() for parameter in tuned.trainable)
        batches = self._batches(task, self.budget, trial.seed)
        with distill(tuned.model) if method.taught else nullcontext():
            course = training.train(tuned, trial.rates, batches, self.budget, self.device, final)
        before = training.outputs(tuned.model, batches[0])
        unmerged = copy.deepcopy(tuned.model) if final else None
        merged = tuned.merge()
        difference = (training.outputs(merged, batches[0]) - before).abs().max().item()
        found |= {**vars(course), "merge_difference": difference, "largest_logit": before.abs().max().item()}
        found["sparsity"] = methods.sparsity(merged)
        if unmerged is not None:  # the zeros to keep are those of the last forward
            report = verify_sparsity(merged, unmerged)
            found |= {"zeros_lost": report.lost, "violations": report.violations}
        return found | self.measure(task, merged, final)

    def _batches(self, task: str, budget: Budget, seed: int) -> list[training.Batch]:
        return training.draw(self.num_train(task), budget, seed, lambda indices: self.collate(task, indices))

    def _tuned_first(self, task: str) -> Path:
        """The folder of the tuned dense model, made by the first process that asks for it."""
        budget = replace(self.budget, steps=self.budget.tuned_first)
        name = f"{self.model}-{task}-tuned-{budget.steps}x{budget.batch_size}x{budget.length}-clip{budget.clip:g}"
        folder = self.store.checkpoints / name
        with self.store.claim(name, wait=True):
            if not folder.is_dir():
                set_seed(SEARCH_SEED)
                tuned = pst_methods.dense(self.load(task), Setup(0.0, self.heads, self.task_type))
                rate = self.small(f"{task} dense").get("head_rate", 0.0)
                tuned = with_head_rate(tuned, self.heads, rate) if rate else tuned
                batches = self._batches(task, budget, SEARCH_SEED)
                training.train(tuned, self.start(task, "dense"), batches, budget, self.device)
                save_complete(tuned.merge(), folder)
        return folder
