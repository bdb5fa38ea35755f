"""Causal language models: their text, their pruned checkpoints, and one run of a row.

The training text is WikiText-2's validation file, whose last tenth is the validation part that rates are chosen on;
the test text is `test_a`; C4 calibrates the pruners. (WikiText-2's own training file is not among the data.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from benchmarks.leaderboard import methods, training, zeroshot
from benchmarks.leaderboard.methods import METHODS
from benchmarks.leaderboard.plan import Line
from benchmarks.leaderboard.settings import FINAL, SEARCH, Budget, Trial
from benchmarks.leaderboard.store import Store, save_complete
from benchmarks.leaderboard.variants import VARIANTS
from peft_sparse import calibration_batches, distill, perplexity, verify_sparsity
from peft_sparse.pruning import prune_magnitude, prune_sparsegpt, prune_wanda

PRUNERS = {"wanda": prune_wanda, "sparsegpt": prune_sparsegpt, "magnitude": prune_magnitude}
SETTINGS = {
    "50%": ("unstructured", 0.5),
    "75%": ("unstructured", 0.75),
    "2:4": ("2:4", 0.5),
    "2:8": ("2:8", 0.75),
}
CASES = tuple(f"{pruner} {setting}" for pruner in ("wanda", "sparsegpt") for setting in ("50%", "75%", "2:4"))
DENSE_CASE = "dense"  # of the rows that start from the dense model, which are the same for all cases
VALIDATION_SHARE = 0.1
ALL = {**METHODS, **VARIANTS}
TRAIN_TEXT, TEST_TEXT, CALIBRATION = "wikitext2/valid.txt", "wikitext2/test_a.txt", "c4_calibration/c4_300.jsonl"


class CausalLm:
    """The part `causal-lm` on one model.

    Args:
        folder: a model that transformers reads.
        data: laid out as `shared/data`.
        store: where checkpoints are kept.
        budget, device: of all runs.
        label: the model's name in tables and in the store; None: the folder's.
    """

    name = "causal-lm"
    metric, better = "perplexity", "lower"
    heads: tuple[str, ...] = ()  # none is new
    ours = methods.OURS
    titles: Mapping[str, str] = {name: method.title for name, method in ALL.items()}
    rivals = tuple(
        name for name, method in ALL.items() if name != methods.OURS and name != "pruned" and not method.dense
    )

    def __init__(
        self, folder: Path, data: Path, store: Store, budget: Budget, device: torch.device, label: str | None = None
    ) -> None:
        self.folder, self.data, self.store, self.budget, self.device = folder, data, store, budget, device
        self.model = folder.name if label is None else label
        logging.disable_progress_bar()  # of each load

    @classmethod
    def small(cls, case: str) -> Mapping[str, float]:
        """What the small budget of a case has instead of the part's."""
        return {}

    @classmethod
    def all_cases(cls) -> tuple[str, ...]:
        """Those of the whole table."""
        return CASES

    def lines(self, cases: Sequence[str], rows: list[str] | None, seeds: tuple[int, ...]) -> list[Line]:
        """The rows of all cases; those that start from the dense model come first, once.

        Raises:
            SystemExit: for a case or a row that there is not.
        """
        rows = list(METHODS) if rows is None else rows
        for case in cases:
            pruner, _, setting = case.partition(" ")
            if pruner not in PRUNERS or setting not in SETTINGS:
                raise SystemExit(f"A case is a pruner of {list(PRUNERS)} and one of {list(SETTINGS)}, got {case!r}.")
        for row in rows:
            if row not in ALL:
                raise SystemExit(f"A row of {self.name} is one of {list(ALL)}, got {row!r}.")
        pairs = [(DENSE_CASE, row) for row in rows if ALL[row].dense]
        pairs += [(case, row) for case in cases for row in rows if not ALL[row].dense]
        return [Line(self.name, self.model, case, row, ALL[row].start, seeds, self.budget) for case, row in pairs]

    # The text

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    def _tokens(self, name: str) -> torch.Tensor:
        text = (self.data / name).read_text(encoding="utf-8")
        return torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])

    @cached_property
    def _windows(self) -> torch.Tensor:
        """(windows, length) of the training text, the validation part at the end."""
        tokens, length = self._tokens(TRAIN_TEXT), self.budget.length
        return tokens[: len(tokens) // length * length].view(-1, length)

    @cached_property
    def _num_train(self) -> int:
        return len(self._windows) - max(1, int(VALIDATION_SHARE * len(self._windows)))

    @cached_property
    def _test(self) -> torch.Tensor:
        tokens = self._tokens(TEST_TEXT)
        return tokens if self.budget.test_rows is None else tokens[: self.budget.test_rows * self.budget.length]

    def batches(self, seed: int) -> list[training.Batch]:
        """Those of a seed."""

        def collate(indices: list[int]) -> training.Batch:
            ids = self._windows[indices].to(self.device)
            return {"input_ids": ids, "labels": ids}

        return training.draw(self._num_train, self.budget, seed, collate)

    # The checkpoints

    def load(self, folder: Path) -> nn.Module:
        """In float32, from disk: no run sees what another one did."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)

    def checkpoint(self, case: str) -> Path:
        """The folder of the pruned model, made by the first process that asks for it."""
        if case == DENSE_CASE:
            return self.folder
        calibration = f"{self.budget.calibration_rows}x{self.budget.length}"
        name = f"{self.model}-{case.replace(' ', '-').replace(':', '_').replace('%', '')}-{calibration}"
        folder = self.store.checkpoints / name
        with self.store.claim(name, wait=True):
            if not folder.is_dir():
                self._prune(case, folder)
        return folder

    def _prune(self, case: str, folder: Path) -> None:
        pruner, _, setting = case.partition(" ")
        pattern, sparsity = SETTINGS[setting]
        model = self.load(self.folder)
        if pruner == "magnitude":
            prune_magnitude(model, pattern, sparsity)
        else:
            lines = (self.data / CALIBRATION).read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line)["text"] for line in lines]
            rows, length = self.budget.calibration_rows, self.budget.length
            batches = calibration_batches(texts, self.tokenizer, num_sequences=rows, length=length)
            PRUNERS[pruner](model, batches, pattern, sparsity)
        save_complete(model, folder)

    def teacher(self, seed: int) -> nn.Module:
        """The dense model, tuned on the batches of a seed; made by the first process that asks for it."""
        method, budget = METHODS["dense_lora"], self.budget
        name = f"{self.model}-teacher-{budget.steps}x{budget.batch_size}x{budget.length}-clip{budget.clip:g}-{seed}"
        folder = self.store.checkpoints / name
        with self.store.claim(name, wait=True):
            if not folder.is_dir():
                set_seed(seed)
                tuned = method.adapt(self.load(self.folder))
                training.train(tuned, method.start, self.batches(seed), budget, self.device)
                save_complete(tuned.merge(), folder)
        return self.load(folder)

    # A run

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train, merge, verify and measure."""
        method, folder = ALL[trial.row], self.checkpoint(trial.case)
        model = self.load(folder)
        found: dict[str, Any] = {"fingerprint": methods.fingerprint(model)}
        if method.adapt is not None:
            teacher = self.teacher(trial.seed) if method.taught else None
            set_seed(trial.seed)
            tuned = method.adapt(model)
            found["trainable"] = sum(parameter.numel() for parameter in tuned.trainable)
            batches = self.batches(trial.seed)
            with distill(tuned.model, teacher) if teacher is not None else nullcontext():
                course = training.train(tuned, trial.rates, batches, self.budget, self.device, trial.stage == FINAL)
            found |= vars(course)
            before = training.outputs(tuned.model, batches[0])
            model = tuned.merge()
            difference = (training.outputs(model, batches[0]) - before).abs().max().item()
            found |= {"merge_difference": difference, "largest_logit": before.abs().max().item()}
        if trial.stage == SEARCH:
            tokens = self._windows[self._num_train :][: self.budget.validation_rows].flatten()
            return found | {"score": self._perplexity(model, tokens)}
        report = verify_sparsity(model, folder)
        zeros = {"zeros_lost": report.lost, "violations": report.violations, "sparsity": methods.sparsity(model)}
        value = self._perplexity(model, self._test)
        return found | zeros | {"score": value, "perplexity": value, **self._zeroshot(model)}

    def _perplexity(self, model: nn.Module, tokens: torch.Tensor) -> float:
        return perplexity(model, tokens, self.budget.length, progress=False)

    def _zeroshot(self, model: nn.Module) -> dict[str, float]:
        if self.budget.zeroshot_rows == 0:
            return {}
        length = model.config.max_position_embeddings
        found = {}
        for task in zeroshot.TASKS:
            rows = zeroshot.read(self.data, task, self.budget.zeroshot_rows)
            found[f"acc_{task}"] = zeroshot.accuracy(model, self.tokenizer, rows, length)
        return found | {"zeroshot": sum(found.values()) / len(found)}
