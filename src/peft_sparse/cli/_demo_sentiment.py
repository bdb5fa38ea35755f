"""Part (b) of the demo: from a dense encoder to a sparse classifier, four ways, with the same data and steps.

    PST                  sparsifies while it tunes; trains factors of low rank
    movement             the same with a score matrix and a full update (arXiv 2005.07683)
    gradual magnitude    a full update, the smallest weights go (arXiv 1710.01878)
    one-shot magnitude   the dense tuned model, its smallest weights set to zero, nothing after

The reference is full fine-tuning, dense. Every accuracy is on the same held-out snippets.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import TaskType, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from peft_sparse.cli._demo_data import Example
from peft_sparse.cli._demo_training import device, quiet, train
from peft_sparse.evaluation import sparsity_report
from peft_sparse.pruning import prune_magnitude
from peft_sparse.training import SparsityCallback
from peft_sparse.tuners.pst import PstConfig

MAX_TOKENS = 64
EVALUATION_BATCH_SIZE = 64


@dataclass(frozen=True)
class Settings:
    """What part (b) runs on; `model` is the folder of an encoder."""

    model: str
    train: list[Example]
    held_out: list[Example]
    output: Path
    steps: int = 120
    batch_size: int = 16
    sparsity: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """A row that is trained with `PstConfig`."""

    name: str
    importance: str
    weight_update: str
    lr: float


DENSE_LR = 1e-4
METHODS = (
    Method("magnitude, gradual", "magnitude", "full", lr=3e-4),
    Method("movement", "movement", "full", lr=3e-4),
    Method("PST", "pst", "low_rank", lr=5e-4),
)


@dataclass
class Row:
    """What was measured of one classifier. `sparsity`: of the linears inside the blocks, as stored after merging."""

    name: str
    accuracy: float
    accuracy_merged: float | None
    sparsity: float
    trainable_parameters: int
    trainable_share: float
    seconds: float
    saved_in: str | None = None


def run(settings: Settings) -> list[Row]:
    """Train and measure every row."""
    data = _Data(settings)
    rows = _dense_rows(settings, data)
    rows += [_sparse_row(settings, data, method) for method in METHODS]
    return rows


def majority(examples: list[Example]) -> float:
    """Accuracy of always giving the more frequent label."""
    positive = sum(example.label for example in examples) / len(examples)
    return max(positive, 1 - positive)


class _Data:
    """Tokenised examples, and what turns a list of them into a batch."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.train = self._tokenise(settings.train)
        # by length, so that a batch has little padding
        self.held_out = sorted(self._tokenise(settings.held_out), key=lambda example: len(example["input_ids"]))

    def _tokenise(self, examples: list[Example]) -> list[dict]:
        encoded = self.tokenizer([example.text for example in examples], truncation=True, max_length=MAX_TOKENS)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": example.label}
            for ids, mask, example in zip(encoded["input_ids"], encoded["attention_mask"], examples, strict=True)
        ]


# Rows


def _dense_rows(settings: Settings, data: _Data) -> list[Row]:
    start = time.perf_counter()
    model = _load(settings)
    _train(model, settings, data, "full fine-tuning", DENSE_LR)
    accuracy = _accuracy(model, data, "dense")
    trainable = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    dense = Row("dense, full fine-tuning", accuracy, None, _sparsity(model), trainable, 1.0, seconds)

    pruned = prune_magnitude(model, sparsity=settings.sparsity)
    accuracy = _accuracy(pruned, data, "pruned after that")
    seconds = time.perf_counter() - start
    name = "  its smallest weights zeroed (one-shot)"
    return [dense, Row(name, accuracy, None, _sparsity(pruned), trainable, 1.0, seconds)]


def _sparse_row(settings: Settings, data: _Data, method: Method) -> Row:
    start = time.perf_counter()
    model = _load(settings)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    config = PstConfig(
        task_type=TaskType.SEQ_CLS,  # with it PEFT trains and saves the new head too
        sparsity=settings.sparsity,
        importance=method.importance,
        weight_update=method.weight_update,
    )
    tuned = get_peft_model(model, config)
    trainable, _ = tuned.get_nb_trainable_parameters()
    _train(tuned, settings, data, method.name, method.lr, [SparsityCallback()])
    accuracy = _accuracy(tuned, data, method.name)
    merged = tuned.merge_and_unload()
    row = Row(
        name=method.name,
        accuracy=accuracy,
        accuracy_merged=_accuracy(merged, data, f"{method.name}, merged"),
        sparsity=_sparsity(merged),
        trainable_parameters=trainable,
        trainable_share=trainable / num_parameters,
        seconds=time.perf_counter() - start,
    )
    if method.importance == "pst":
        row.saved_in = str(_save(merged, settings))
    return row


def _train(
    model: nn.Module,
    settings: Settings,
    data: _Data,
    title: str,
    lr: float,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    train(
        model,
        data.train,
        title=title,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=lr,
        seed=settings.seed,
        collator=data.collator,
        callbacks=callbacks,
    )


@torch.no_grad()
def _accuracy(model: nn.Module, data: _Data, stage: str) -> float:
    model.eval()
    right = 0
    starts = range(0, len(data.held_out), EVALUATION_BATCH_SIZE)
    for start in tqdm(starts, desc="Accuracy", unit="batch", leave=False):
        batch = data.collator(data.held_out[start : start + EVALUATION_BATCH_SIZE]).to(device())
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    accuracy = right / len(data.held_out)
    print(f"Accuracy, {stage}: {accuracy:.4f}", flush=True)
    return accuracy


def _sparsity(model: nn.Module) -> float:
    return sparsity_report(model).total_sparsity


# Loading and saving


def _load(settings: Settings) -> PreTrainedModel:
    set_seed(settings.seed)  # the same new head in every row
    with quiet():
        return AutoModelForSequenceClassification.from_pretrained(settings.model, num_labels=2).to(device())


def _save(model: PreTrainedModel, settings: Settings) -> Path:
    folder = settings.output / "minilm-pst-90"
    shutil.rmtree(folder, ignore_errors=True)
    with quiet():
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(settings.model).save_pretrained(folder)
    return folder
