"""What Trainer's evaluation makes of a model's outputs: metrics, and a language model's loss and perplexity.

Trainer's own `eval_loss` is a mean over batches, each with the weight of its rows. Where rows have unlike numbers of
tokens, that depends on which rows share a batch, and its exp is no perplexity. So a language model's loss is summed
here token by token, and takes the place of Trainer's, by which it chooses the best model too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction
from transformers.utils import ModelOutput

from peft_sparse.evaluation.metrics import compares_numbers
from peft_sparse.evaluation.perplexity import perplexity_of

IGNORED = -100  # the label of what is not to be learned


class Metrics:
    """`compute_metrics` of a Trainer: of labels, of numbers, or of the next tokens of a language model, which have
    `loss`, the mean over all tokens that are learned, and `perplexity` besides."""

    def __init__(self, metrics: dict[str, Any], language_model: bool) -> None:
        self.metrics, self.language_model = metrics, language_model

    def for_trainer(self) -> dict[str, Any]:
        """The arguments of a Trainer that evaluates with this."""
        if self.language_model:
            return {"compute_metrics": self, "preprocess_logits_for_metrics": self.kept}
        return {"compute_metrics": self if self.metrics else None}

    def kept(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What is kept of a batch of a language model, in place of a number for each entry of its vocabulary: sums of
        rows, and where there are metrics, the most likely tokens."""
        sums = row_sums(logits, labels)
        return (sums, logits.argmax(-1)) if self.metrics else sums

    def __call__(self, prediction: Any) -> dict[str, float]:
        predictions, references = prediction.predictions, prediction.label_ids
        average = "macro"  # of F1: also where no more than two of the classes occur
        found: dict[str, float] = {}
        if self.language_model:
            sums, predictions = predictions if self.metrics else (predictions, None)
            found = _loss_and_perplexity(sums)
            if predictions is not None:
                predictions, references = predictions[:, :-1].reshape(-1), references[:, 1:].reshape(-1)
                predictions, references = predictions[references != IGNORED], references[references != IGNORED]
        elif predictions.ndim > 1 and predictions.shape[-1] > 1:
            average = "binary" if predictions.shape[-1] == 2 else "macro"
            predictions = predictions.argmax(-1)
        else:
            predictions = predictions.reshape(-1)
        for name, metric in self.metrics.items():
            kind = np.float64 if compares_numbers(name) or predictions.dtype.kind == "f" else np.int64
            own = {"average": average} if name == "f1" else {}
            values = metric.compute(predictions=predictions.astype(kind), references=references.astype(kind), **own)
            odd = next((key for key, value in values.items() if np.ndim(value) or not np.isreal(value)), None)
            if odd is not None:
                raise ValueError(f"A metric gives one number under each of its names, got {values[odd]!r} as {odd!r}.")
            found |= {key: float(value) for key, value in values.items()}
        return found

    def check(self, outputs: int) -> None:
        """Try the metrics before anything is trained.

        Args:
            outputs: of the model for a row: classes, or 1 for a number; without a meaning for a language model.

        Raises:
            ValueError: if one of them does not take what such a model gives, or gives no number.
        """
        numbers = np.arange(max(outputs, 2))
        predictions: Any = np.eye(outputs)[numbers] if outputs > 1 else numbers[:, None].astype(np.float64)
        if self.language_model:
            tokens = np.tile(numbers, (2, 1))
            predictions, numbers = (np.ones((2, 2)), tokens), tokens
        for name, metric in self.metrics.items():
            try:
                Metrics({name: metric}, self.language_model)(EvalPrediction(predictions, numbers))
            except Exception as error:  # anything that somebody's metric may raise
                raise ValueError(
                    "`evaluation.metrics` take the model's predictions and the labels, and no other settings, got "
                    f"{name!r}, which fails on a try ({type(error).__name__}: {' '.join(str(error).split())}); name "
                    "another one."
                ) from error


def row_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each row's next tokens, and how many these are.

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), not shifted; `IGNORED` where nothing is to be learned.

    Returns:
        (rows, 2) float32.
    """
    sums = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one by one: of a batch it would be a copy
        learned = targets != IGNORED
        nll = F.cross_entropy(row[learned].float(), targets[learned], reduction="sum")
        sums.append(torch.stack([nll, learned.sum().float()]))
    return torch.stack(sums)


def _loss_and_perplexity(sums: np.ndarray) -> dict[str, float]:
    total, tokens = sums.astype(np.float64).sum(0).tolist()
    return {"loss": total / tokens if tokens else float("nan"), "perplexity": perplexity_of(total, tokens)}


def without_times(measured: dict[str, Any]) -> dict[str, Any]:
    """What a Trainer's evaluation has measured, without how long it took."""
    times = ("_runtime", "_per_second", "preparation_time", "epoch")
    return {name: value for name, value in measured.items() if not name.endswith(times)}


def other_outputs() -> list[str]:
    """`ignore_keys` of a Trainer's evaluation: all that the outputs of loaded models may have beside loss and logits,
    such as a cache that is no tensor (Mamba), or a router's loss, which comes before the logits."""
    return sorted({name for output in _subclasses(ModelOutput) for name in _fields(output)} - {"loss", "logits"})


def _subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def _fields(output: type) -> Iterator[str]:
    return iter(getattr(output, "__dataclass_fields__", ()))
