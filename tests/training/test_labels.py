"""Which class a row's label is: by the names that a recipe lists, those of the model, or its number."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.training import evaluate_model, evaluate_recipe, finetune, make_recipe, plan_finetune
from peft_sparse.training.build import load_tokenizer, model_of, own_labels
from peft_sparse.training.data import make_examples
from peft_sparse.training.labels import Labels, label_names
from peft_sparse.training.parts import DataPart, ModelPart

from models import tiny_bert
from recipes import classifier, write_rows

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")
MODEL = ModelPart(path="unused", task="sequence_classification")
a_label = st.one_of(st.integers(), st.booleans(), st.text(), st.floats(allow_nan=False, allow_infinity=False))


def labels(listed=None, own=None, number=None):
    model = ModelPart(path="unused", task=MODEL.task, num_labels=number)
    data = DataPart(path="unused", text="text", label="label", labels=listed)
    return Labels.of(data, model, {name: index for index, name in enumerate(own or [])})


@given(st.lists(a_label, min_size=2, max_size=6, unique_by=lambda label: label_names([label])[0]))
def test_a_listed_label_is_its_place_and_the_merged_model_says_the_same(listed):
    """Training looks in `data.labels`, what comes after it in the model's config.json."""
    names = label_names(listed)
    for index, label in enumerate(listed):
        assert labels(listed).number({"label": label}) == labels(own=names).number({"label": label}) == index


@pytest.mark.parametrize(
    ("own", "values"),
    [
        (["1", "0"], [(1, 0), (0, 1), (1.0, 0), ("1", 0), ("0.0", 1), (True, 0), (False, 1)]),
        (["0", "1"], [(0, 0), (1, 1), ("1", 1), (True, 1)]),
        (["-1", "0", "1"], [(-1, 0), (0, 1), (1.0, 2), ("-1", 0)]),
        (["True", "False"], [(True, 0), (False, 1), ("true", 0), ("False", 1)]),
        (["true", "false"], [(True, 0), (False, 1), ("True", 0), ("false", 1)]),
        (["LABEL_0", "LABEL_1"], [(0, 0), (1, 1), ("LABEL_1", 1), ("1", 1), (True, 1)]),
        (["hi", "low"], [(0, 0), (1, 1), ("low", 1), ("hi", 0)]),
        (["None", "NA", "001"], [("None", 0), ("NA", 1), ("001", 2)]),
    ],
)
def test_the_names_of_the_model_count_whatever_type_a_value_has(own, values):
    assert [labels(own=own).number({"label": value}) for value, _ in values] == [number for _, number in values]


def test_a_number_is_that_of_a_listed_name_where_no_name_is_a_number():
    for value, number in ((0, 0), (1, 1), ("1", 1), (1.0, 1), (True, 1), ("pos", 1)):
        assert labels(["neg", "pos"]).number({"label": value}) == number


@pytest.mark.parametrize(
    ("given", "value", "message"),
    [
        ({"listed": ["neg", "pos"]}, 2, r"`data.labels`, or its number, from 0 to 1, got 2 in .*; list all labels"),
        ({"listed": ["neg", "pos"]}, -1, "from 0 to 1, got -1"),
        ({"listed": ["neg", "pos"]}, "0.5", "from 0 to 1, got '0.5'"),
        ({"listed": ["neg", "pos"]}, "meh", r"got 'meh' in column 'label' besides, of the row {'label': 'meh'}; add"),
        ({"listed": ["none", "1"]}, 0, "besides, of the row {'label': 0}; add it"),
        ({"own": ["1", "2", "3"]}, 0, r"own names 1, 2, 3 count, .* got 0 in column 'label' of the row {'label': 0}"),
        ({"own": ["True", "False"]}, 1, "own names True, False count"),
        ({"listed": ["1", "2"]}, 3, r"got 3 in column 'label' besides, of the row {'label': 3}; add it"),
        ({"own": ["neg", "neu", "pos"]}, 3, "of 3 classes is from 0 to 2, got 3"),
        ({}, 2, r"of 2 classes is from 0 to 1, got 2 .*, list the labels that there are in `data.labels` "),
        ({"own": ["neg", "neu", "pos"], "number": 2}, "pos", "is a number, got 'pos'"),
        ({}, None, r"has a label, got None in column 'label' of the row {'label': None}; leave out rows without"),
        ({"listed": ["a", "b"]}, None, "leave out rows without a label"),
        ({"number": 1}, None, "leave out rows without a label"),
        ({"number": 1}, "much", "a number where it is the target, got 'much'"),
    ],
)
def test_what_is_no_label_is_named_with_its_row(given, value, message):
    with pytest.raises(ValueError, match=message):
        labels(**given).number({"label": value})


MNLI = ["entailment", "neutral", "contradiction"]


def test_numbers_of_a_data_set_go_by_its_own_names():
    """Those of MNLI and of the models for it are the same in another order."""
    feature = datasets.ClassLabel(names=MNLI)
    for mine in (labels(own=["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]), labels(MNLI[::-1])):
        named = mine.of_column(feature)
        assert [named.number({"label": value}) for value in (0, 1, 2)] == [2, 1, 0]
    two = labels(["neutral", "entailment"]).of_column(feature)
    assert two.number({"label": 0}) == 1
    with pytest.raises(ValueError, match="one of neutral, entailment, got 'contradiction' in column 'label'"):
        two.number({"label": 2})
    with pytest.raises(ValueError, match="got -1 in column"):
        labels(MNLI).of_column(feature).number({"label": -1})


def test_names_that_have_nothing_in_common_leave_the_numbers():
    feature = datasets.ClassLabel(names=["neg", "pos"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mine in (labels(own=["LABEL_0", "LABEL_1"]), labels(number=2), labels(number=1)):
            assert mine.of_column(feature).number({"label": 1}) == 1
        assert labels(["a", "b"]).of_column(None) == labels(["a", "b"])
    with pytest.warns(UserWarning, match=r"called neg, pos in the data, and bad, good by the model, so"):
        assert labels(own=["bad", "good"]).of_column(feature).number({"label": 1}) == 1


def test_a_data_set_with_names_is_measured_and_learned_by_them(tmp_path):
    bert = tiny_bert()
    bert.config.num_labels, bert.classifier = 3, torch.nn.Linear(32, 3)
    bert.config.id2label, bert.config.label2id = dict(enumerate(MNLI[::-1])), {n: i for i, n in enumerate(MNLI[::-1])}
    numbers = [0, 1, 2, 2, 1, 0, 2, 0]
    rows = {"text": [f"w{index} w{index + 3}" for index in range(8)], "label": numbers}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=MNLI)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    asked = classifier(tmp_path, tmp_path / "rows.parquet", base=bert)
    examples = make_examples(
        asked.data, asked.model, load_tokenizer(asked.model), seed=0, own_labels=own_labels(asked.model)
    )
    for part in (examples.train, examples.validation):
        assert [2 - row["labels"] for row in part] == numbers


@pytest.mark.parametrize("listed", [[1, 0], [True, False], [-1, 0, 1]])
def test_a_merged_model_is_measured_by_the_names_that_it_was_trained_with(tmp_path, sentences, listed):
    rows = [json.loads(line) for line in Path(sentences).read_text().splitlines()]
    path = write_rows(tmp_path / "named.jsonl", [row | {"label": listed[row["label"]]} for row in rows])
    data = {"text": "text", "label": "label", "max_length": 16}
    model = {"new_head": True}
    asked = classifier(tmp_path, path, data=data | {"labels": listed}, model=model, output={"merge": True})
    result = finetune(asked)
    expected = result.metrics["eval_loss"]
    measured = evaluate_model(result.merged, data=data | {"path": path, "validation_split": "train"}, progress=False)
    assert measured["loss"] == pytest.approx(expected, abs=1e-5)
    again = {"model": {"path": result.merged, "task": "sequence_classification"}, "adapter": {"method": "pst"}}
    again |= {"data": data | {"path": path, "validation_split": "train"}}
    again = make_recipe(again | {"training": {"output_dir": str(tmp_path / "again")}})
    assert evaluate_recipe(again, progress=False)["loss"] == pytest.approx(expected, abs=1e-5)
    assert list(own_labels(again.model)) == label_names(listed)
    assert model_of(again).config.id2label == dict(enumerate(label_names(listed)))


@pytest.mark.parametrize(("kind", "count"), [("classifier", 3), ("named", 3), ("bare", 2)])
def test_a_recipe_without_a_number_of_classes_takes_the_checkpoints(tmp_path, sentences, kind, count):
    """Its head's, or that of its names; LABEL_0 to LABEL_2 without a head are nothing but a default."""
    base = tiny_bert()
    names = ["LABEL_0", "LABEL_1", "LABEL_2"] if kind == "bare" else ["neg", "neu", "pos"]
    base.config.num_labels = 3
    base = type(base)(base.config)
    base.config.id2label, base.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    asked = classifier(tmp_path, sentences, base=base if kind == "classifier" else base.bert)
    assert model_of(asked).config.num_labels == count
    if count == 3:
        path = write_rows(tmp_path / "named.jsonl", [{"text": "w1 w2", "label": name} for name in names])
        assert plan_finetune(classifier(tmp_path, path, base=base, evaluation={}))["training examples"] == 3


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_model_that_was_for_other_labels_is_tuned_for_those_of_the_recipe(tmp_path, sentences, problem):
    base = tiny_bert()
    base.config.problem_type = problem
    asked = classifier(tmp_path, sentences, base=base, training={"max_steps": 1})
    assert model_of(asked).config.problem_type == "single_label_classification"
    assert finetune(asked).steps == 1


def test_labels_that_could_not_be_told_apart_are_refused(tmp_path, sentences):
    for listed, message in (([1, "1"], "each once, got '1' twice"), ([None, "a"], "truth values, got None")):
        with pytest.raises(ValueError, match=message):
            classifier(tmp_path, sentences, data={"text": "text", "label": "label", "labels": listed})
