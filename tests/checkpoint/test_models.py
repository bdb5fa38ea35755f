"""load_model: a packed checkpoint behaves as its dense twin."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertForSequenceClassification

from peft_sparse import SppConfig
from peft_sparse.checkpoint import load_model, load_sparse, merge_checkpoint, save_sparse
from peft_sparse.linears import PackedLinear, block_linears
from peft_sparse.pruning import prune_magnitude

import models

TASK = "sequence_classification"
REGRESSION = {"num_labels": 1, "problem_type": "regression", "hidden_dropout_prob": 0.25}
NEW_HEAD = {"ignore_mismatched_sizes": True}


@pytest.fixture
def twins(tmp_path) -> list[Path]:
    """A classifier with two labels, dense and packed."""
    model = prune_magnitude(models.tiny_bert(), "2:4")
    model.save_pretrained(tmp_path / "dense")
    save_sparse(model, tmp_path / "packed")
    return [tmp_path / "dense", tmp_path / "packed"]


def same_but_for_the_head(model, reference) -> bool:
    ours, theirs = model.state_dict(), reference.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs if not name.startswith("classifier"))


def test_fields_of_the_config_are_those_of_the_model(twins):
    for source in twins:
        model = load_model(source, TASK, config=REGRESSION | NEW_HEAD)
        assert type(model) is BertForSequenceClassification
        assert model.classifier.weight.shape == (1, 32) and model.classifier.weight.isfinite().all()
        assert (model.num_labels, model.config.problem_type) == (1, "regression")
        assert model.bert.encoder.layer[0].output.dropout.p == 0.25
        assert same_but_for_the_head(model, load_model(source))


def test_another_head_is_asked_for(twins):
    for source in twins:
        with pytest.raises(ValueError, match=r"its head has another number of labels\. .*`model.new_head`"):
            load_model(source, TASK, config={"num_labels": 5})
    with pytest.raises(ValueError, match=r"mismatched keys \['classifier.bias .*`ignore_mismatched_sizes=True`"):
        load_sparse(twins[1], config={"num_labels": 5})
    for verify in (True, False):
        with pytest.warns(UserWarning, match=r"new and random, .* \['classifier.bias', 'classifier.weight'\]"):
            model = load_sparse(
                twins[1], packed=True, config={"num_labels": 5}, ignore_mismatched_sizes=True, verify_checksums=verify
            )
    assert all(isinstance(linear, PackedLinear) for linear in block_linears(model).values())


def test_the_blocks_are_what_was_saved_in_any_case(twins):
    for verify in (True, False):
        with pytest.raises(ValueError, match="tensors of its model, got"):
            load_sparse(
                twins[1], config={"intermediate_size": 64}, ignore_mismatched_sizes=True, verify_checksums=verify
            )
    with pytest.raises(ValueError, match=r"a BertConfig has, got 'num_lables'"):
        load_model(twins[1], config={"num_lables": 3})


def test_a_base_without_a_head(tmp_path):
    save_sparse(prune_magnitude(models.tiny_bert(), "2:4").bert, tmp_path)
    with pytest.warns(UserWarning, match="new and random"):
        model = load_model(tmp_path, TASK, config=REGRESSION)
    assert model.classifier.out_features == 1 and model.bert.encoder.layer[0].output.dropout.p == 0.25


def test_an_adapter_brings_its_own_head(twins, tmp_path):
    for source in twins:
        base = load_model(source, TASK, config={"num_labels": 5} | NEW_HEAD)
        tuned = get_peft_model(base, SppConfig(r=4, task_type="SEQ_CLS"))
        head = tuned.classifier.modules_to_save["default"].weight.detach().clone()
        tuned.save_pretrained(tmp_path / f"adapter-{source.name}")
        merge_checkpoint(tmp_path / f"adapter-{source.name}", tmp_path / f"merged-{source.name}")
        assert torch.equal(load_model(tmp_path / f"merged-{source.name}").classifier.weight, head)
