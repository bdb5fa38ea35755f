"""load_model: a packed checkpoint behaves as its dense twin."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from peft_sparse import SppConfig
from peft_sparse.checkpoint import load_model, load_sparse, merge_checkpoint, prune_checkpoint, save_sparse
from peft_sparse.checkpoint.convert import pack_checkpoint, unpack_checkpoint
from peft_sparse.checkpoint.load import load_stored
from peft_sparse.linears import PackedLinear, block_linears
from peft_sparse.pruning import prune_magnitude
from peft_sparse.storage import open_model

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


@pytest.mark.parametrize("num_labels", [1, 2, 3, 5])
def test_the_number_of_labels_is_kept(num_labels, tmp_path):
    """BART's config means three where config.json tells none, and transformers tells none of two."""
    model = prune_magnitude(models.tiny_bart(num_labels=num_labels), "2:4")
    save_sparse(model, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed again")
    for name in ("packed", "dense", "packed again"):
        found = load_model(tmp_path / name)
        assert found.config.num_labels == num_labels and found.config.label2id == model.config.label2id
        assert torch.equal(found.classification_head.out_proj.weight, model.classification_head.out_proj.weight)


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_s_head_of_another_number_of_labels_by_another_name(packed, tmp_path):
    prune_magnitude(models.tiny_bart(num_labels=5), "2:4").save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", TASK, config={"num_labels": 2} | NEW_HEAD)
    tuned = get_peft_model(base, SppConfig(r=4, task_type="SEQ_CLS", modules_to_save=["classification_head"]))
    head = tuned.base_model.model.classification_head.modules_to_save["default"].out_proj.weight.detach().clone()
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"got num_labels=5 and a head for 2 beside the adapter in .*; leave the number"
    ):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", num_labels=5)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", packed=packed)
    for name in ("adapter", "merged"):
        model = load_model(tmp_path / name)
        assert model.config.num_labels == 2
        assert any(torch.equal(parameter, head) for parameter in model.parameters())


def test_a_head_that_the_adapter_brings_is_not_called_random(twins, tmp_path, caplog):
    for source in twins:
        base = load_model(source, TASK, config={"num_labels": 3} | NEW_HEAD, on_missing=lambda names: None)
        get_peft_model(base, SppConfig(r=4, task_type="SEQ_CLS")).save_pretrained(tmp_path / f"{source.name}-adapter")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*random")
            caplog.clear()
            assert load_model(tmp_path / f"{source.name}-adapter").config.num_labels == 3
            assert "LOAD REPORT" not in caplog.text  # transformers' own, that the head is new
        settings = json.loads((tmp_path / f"{source.name}-adapter" / "adapter_config.json").read_text())
        settings["labels"] = ["no", "yes"]
        (tmp_path / f"{source.name}-adapter" / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.warns(UserWarning, match="got 2 names and 3 labels in .* left out"):
            assert load_model(tmp_path / f"{source.name}-adapter").config.id2label[2] == "LABEL_2"
        without_pooler = BertForSequenceClassification.from_pretrained(twins[0])
        for name in ("bias", "weight"):
            delattr(without_pooler.bert.pooler.dense, name)
        without_pooler.save_pretrained(tmp_path / "headless")
        with pytest.warns(UserWarning, match=r"has weights for \['bert.pooler.dense.bias', .* new and random"):
            load_model(tmp_path / f"{source.name}-adapter", base=tmp_path / "headless")


def test_a_config_that_tells_another_number_of_labels(tmp_path):
    """As plain transformers writes a BART of two labels."""
    models.tiny_bart(num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tells another number of labels; give that in `config`, as {'num_labels'"):
        load_stored(open_model(tmp_path))
    assert load_stored(open_model(tmp_path), changes={"num_labels": 2}).config.num_labels == 2


def test_shapes_of_another_config_are_not_blamed_on_a_head(tmp_path):
    models.tiny_llama().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_size": 40}))
    for task in (None, "causal_lm"):
        with pytest.raises(
            ValueError, match=r"got others for .*: its config.json is that of another model, or damaged"
        ):
            load_model(tmp_path, task)


@pytest.mark.parametrize("part", ["mlp.up_proj", "input_layernorm"])
def test_weights_of_the_blocks_are_not_made_up(part, tmp_path):
    """As transformers makes them up, with a table that nobody sees who has asked for quiet."""
    model = prune_magnitude(models.tiny_llama(), "2:4")
    model.save_pretrained(tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.{part}.weight"
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    get_peft_model(model, SppConfig(r=4)).save_pretrained(tmp_path / "adapter")
    for work in (
        lambda: prune_checkpoint(tmp_path / "damaged", tmp_path / "new", "magnitude", sparsity=0.75),
        lambda: pack_checkpoint(tmp_path / "damaged", tmp_path / "new"),
        lambda: merge_checkpoint(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "damaged"),
    ):
        with pytest.raises(ValueError, match=rf"got (none for|missing keys) \['{name}'\] \(1 in all\)"):
            work()
    assert not (tmp_path / "new").exists()
