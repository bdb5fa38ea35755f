"""Metrics that need no network: against their definitions, one example at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction

pytest.importorskip("evaluate")

from peft_sparse.evaluation.metrics import BUNDLED, load_metric
from peft_sparse.training.metrics import Metrics

labels = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)
METRICS = {name: load_metric(name) for name in BUNDLED}


@given(labels)
def test_two_classes_by_their_confusion_matrix(pairs):
    found, meant = (list(column) for column in zip(*pairs, strict=True))
    tp = sum(f and m for f, m in pairs)
    fp, fn = sum(found) - tp, sum(meant) - tp
    tn = len(pairs) - tp - fp - fn
    compute = lambda name: METRICS[name].compute(predictions=found, references=meant)[name]  # noqa: E731
    assert compute("accuracy") == pytest.approx((tp + tn) / len(pairs))
    assert compute("f1") == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute("matthews_correlation") == pytest.approx((tp * tn - fp * fn) / scale if scale else 0.0, abs=1e-9)


def test_more_classes_have_the_mean_f1():
    found, meant = [0, 1, 2, 2], [0, 2, 2, 1]
    assert METRICS["f1"].compute(predictions=found, references=meant)["f1"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_f1_is_decided_by_the_labels_that_the_model_has():
    """Two of three classes occur: no F1 of label 1 alone."""
    logits, references = np.eye(3)[[0, 1, 0, 1]], np.array([0, 1, 1, 1])
    f1 = Metrics({"f1": METRICS["f1"]}, language_model=False)
    assert f1(EvalPrediction(logits, references))["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert f1(EvalPrediction(logits[:, :2], references))["f1"] == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="'binary' or 'macro', got 'weighted'"):
        METRICS["f1"].compute(predictions=[0], references=[0], average="weighted")


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation"])
def test_labels_are_whole_numbers(name):
    for found, meant in ([0.7, 1.9], [0, 1]), ([0, 1], [0.2, 1.0]), ([math.nan, 1], [0, 1]):
        with pytest.raises(ValueError, match=rf"'{name}' compares labels, whole numbers, got (0.7|0.2|nan); take"):
            METRICS[name].compute(predictions=found, references=meant)
    expected = METRICS[name].compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert METRICS[name].compute(predictions=[0.0, 1.0, 1.0], references=[False, True, False]) == expected


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=20))
def test_correlations(pairs):
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    result = METRICS["pearsonr"].compute(predictions=x.tolist(), references=y.tolist())["pearsonr"]
    if x.std() == 0 or y.std() == 0:
        assert math.isnan(result)
        return
    assert result == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-9)
    rank = METRICS["spearmanr"].compute(predictions=x.tolist(), references=y.tolist())["spearmanr"]
    cubed = METRICS["spearmanr"].compute(predictions=(x**3).tolist(), references=y.tolist())["spearmanr"]
    assert rank == pytest.approx(cubed, abs=1e-9)  # depends on the order alone
    assert METRICS["spearmanr"].compute(predictions=[1.0, 2, 2, 4], references=[1.0, 3, 3, 9])["spearmanr"] == 1.0


def test_another_name_without_the_hub_is_an_error_that_lists_ours():
    with pytest.raises(ValueError, match=r"accuracy, f1, .*got 'no_such_metric'"):
        load_metric("no_such_metric")
