"""Metrics as modules of the package `evaluate`: ours, which need no network, and by name those of the Hub.

Hugging Face keeps the code of `evaluate`'s metrics on the Hub, so that `evaluate.load("accuracy")` needs a network and
runs what it downloads. The few that GLUE needs are here under the same names, with the same keys and values, as
`evaluate.Metric`s; they are taken first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Compute = Callable[..., dict[str, float]]  # of predictions and references


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predictions == references).mean())}


def _f1(predictions: np.ndarray, references: np.ndarray, average: str | None = None) -> dict[str, float]:
    """2 TP / (2 TP + FP + FN): of label 1 ("binary"), or the mean over the labels that occur ("macro"). None: "binary"
    if no other labels than 0 and 1 occur; a model tells better how many it has."""
    if average not in (None, "binary", "macro"):
        raise ValueError(f"`average` is 'binary' or 'macro', got {average!r}.")
    labels = np.union1d(predictions, references)
    if average is None:
        average = "binary" if labels.max(initial=0) <= 1 else "macro"
    wanted = [1] if average == "binary" else labels.tolist()
    scores = []
    for label in wanted:
        found, meant = predictions == label, references == label
        total = found.sum() + meant.sum()
        scores.append(2 * (found & meant).sum() / total if total else 0.0)
    return {"f1": float(np.mean(scores))}


def _matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The correlation of the two assignments, for any number of labels; 0 where one of them is constant."""
    labels = np.union1d(predictions, references)
    found, meant = (np.equal.outer(values, labels).astype(float) for values in (predictions, references))
    found, meant = found - found.mean(0), meant - meant.mean(0)
    scale = math.sqrt((found**2).sum() * (meant**2).sum())
    return {"matthews_correlation": float((found * meant).sum() / scale) if scale else 0.0}


def _correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    x, y = predictions - predictions.mean(), references - references.mean()
    scale = math.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _pearsonr(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"pearsonr": _correlation(predictions, references)}


def _spearmanr(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"spearmanr": _correlation(_ranks(predictions), _ranks(references))}


def _mse(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"mse": float(((predictions - references) ** 2).mean())}


# name: the function, and whether it compares numbers (True) or labels
BUNDLED: dict[str, tuple[Compute, bool]] = {
    "accuracy": (_accuracy, False),
    "f1": (_f1, False),
    "matthews_correlation": (_matthews_correlation, False),
    "pearsonr": (_pearsonr, True),
    "spearmanr": (_spearmanr, True),
    "mse": (_mse, True),
}


_NUMBERS = [name for name, (_, numbers) in BUNDLED.items() if numbers]


def load_metric(name: str) -> Any:
    """A metric of the package `evaluate`.

    Args:
        name: one of `BUNDLED`, or what `evaluate.load` takes: a name on the Hub or the path of a script.

    Raises:
        ValueError: if `evaluate` cannot load it.
        ImportError: if `evaluate` is not installed.

    Examples:
        >>> load_metric("f1").compute(predictions=[1, 0, 1], references=[1, 1, 1])
        {'f1': 0.8}
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metrics are those of the package `evaluate`; `pip install evaluate`.") from error
    if name in BUNDLED:
        return _bundled(name)
    try:
        return evaluate.load(name)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"A metric is one of {', '.join(BUNDLED)}, or one that `evaluate.load` finds, got {name!r} "
            f"({type(error).__name__}: {reason})."
        ) from error


def _bundled(name: str) -> Any:
    import datasets
    import evaluate

    compute, numbers = BUNDLED[name]
    value = datasets.Value("float64")  # "int64" would cut fractions off labels

    class Bundled(evaluate.Metric):
        def _info(self) -> Any:
            features = datasets.Features({"predictions": value, "references": value})
            return evaluate.MetricInfo(
                description=compute.__doc__ or name, citation="", inputs_description="", features=features
            )

        def _compute(self, predictions: Any, references: Any, **settings: Any) -> dict[str, float]:
            given = [np.asarray(predictions), np.asarray(references)]
            return compute(*(given if numbers else [_labels(name, values) for values in given]), **settings)

    return Bundled(keep_in_memory=True, experiment_id=name)


def _labels(name: str, values: np.ndarray) -> np.ndarray:
    odd = values[~(values == np.floor(values))]
    if len(odd):
        raise ValueError(
            f"{name!r} compares labels, whole numbers, got {odd[0]}; take a metric of numbers: {', '.join(_NUMBERS)}."
        )
    return values.astype(np.int64)


def check_metrics_of_numbers(names: Iterable[str]) -> None:
    """Raises:
    ValueError: if a metric of ours is of labels; what it is to measure is a model that gives one number."""
    for name in names:
        if name in BUNDLED and not compares_numbers(name):
            raise ValueError(
                f"A number as the target is measured by metrics of numbers, {', '.join(_NUMBERS)}, got {name!r}, "
                "which compares labels; take one of them."
            )


def compares_numbers(name: str) -> bool:
    """Whether a metric of ours compares numbers; others are taken to compare labels."""
    return name in BUNDLED and BUNDLED[name][1]
