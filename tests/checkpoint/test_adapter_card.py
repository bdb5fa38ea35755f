"""PEFT's `save_pretrained` leaves a card beside an adapter of ours, and no empty form, whoever calls it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

from peft_sparse import PstConfig, SppConfig, prune_magnitude
from peft_sparse.checkpoint.card import MARK

import models

CONFIGS = {
    "spp": SppConfig(r=4, task_type="CAUSAL_LM"),
    "pst": PstConfig(r=2, score_r=2, sparsity=0.5, schedule="constant", task_type="CAUSAL_LM"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*its schedule never advanced", "ignore:Could not find a config file")


def adapted(config, base=None, name="owner/base"):
    base = prune_magnitude(models.tiny_llama(), "2:4") if base is None else base
    base.name_or_path = name
    return get_peft_model(base, copy.deepcopy(config))


def card(folder):
    read = ModelCard.load(folder / "README.md")
    return read.text, read.data


def code(folder: Path, base: str) -> str:
    """What the card says to run, on places here."""
    block = re.search(r"```python\n(.*?)```", card(folder)[0], re.S)[1]
    block = re.sub(r'"(owner/base|the model that it was trained on)"', repr(base), block)
    return block.replace('"path or name of this repository"', repr(str(folder)))


@pytest.mark.parametrize("method", CONFIGS)
def test_the_card_says_what_it_is_and_how_to_load_it(method, tmp_path):
    adapted(CONFIGS[method]).save_pretrained(tmp_path)
    text, data = card(tmp_path)
    assert MARK in text and "More Information Needed" not in text
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/base", "peft", "text-generation")
    assert {"sparse", method, "peft-sparse", "base_model:adapter:owner/base"} <= set(data.tags)
    assert f"| `r` | {CONFIGS[method].r} |" in text
    assert {"spp": "2405.16057", "pst": "2205.11005"}[method] in text
    prune_magnitude(models.tiny_llama(), "2:4").save_pretrained(tmp_path / "base")
    scope: dict = {}
    block = code(tmp_path, str(tmp_path / "base"))
    assert block.index("import peft_sparse") < block.index("import PeftModel")
    exec(block, scope)
    assert isinstance(scope["model"], PeftModel) and type(scope["merged"]).__name__ == "LlamaForCausalLM"


def test_saved_again_it_stays_as_it_is(tmp_path):
    model = adapted(CONFIGS["spp"])
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


def test_a_card_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmy own words")
    adapted(CONFIGS["spp"]).save_pretrained(tmp_path)
    text, data = card(tmp_path)  # PEFT adds its own version and tags, as to each card
    assert "my own words" in text and MARK not in text and data.license == "mit"


def test_trainer_leaves_it_too(tmp_path):
    ids = torch.arange(8)
    rows = [{"input_ids": ids, "labels": ids}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(adapted(CONFIGS["spp"]), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for name in ("adapter", "checkpoint-1"):
        assert MARK in card(tmp_path / name)[0]


def test_a_folder_as_the_base_is_not_named(tmp_path):
    """It says nothing to others, and the Hub refuses such a card."""
    adapted(CONFIGS["spp"], name=str(tmp_path)).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text and "base_model" not in text


@pytest.mark.parametrize("model_cls", [BertForSequenceClassification, BertForTokenClassification])
def test_a_classifier_is_loaded_with_its_number_of_labels(model_cls, tmp_path):
    settings = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model_cls(settings).base_model.save_pretrained(tmp_path / "base")
    settings.num_labels = 5
    task = "SEQ_CLS" if model_cls is BertForSequenceClassification else "TOKEN_CLS"
    adapted(PstConfig(task_type=task), model_cls(settings)).save_pretrained(tmp_path)
    scope: dict = {}
    exec(code(tmp_path, str(tmp_path / "base")), scope)
    assert scope["merged"].config.num_labels == 5 and isinstance(scope["merged"], model_cls)


def test_without_a_task_type_the_class_is_that_of_the_base(tmp_path):
    adapted(SppConfig(r=4)).save_pretrained(tmp_path / "llama")
    assert "LlamaForCausalLM.from_pretrained(" in card(tmp_path / "llama")[0]
    base = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(base, PstConfig(target_modules=["0"])).save_pretrained(tmp_path / "own")
    assert "base = ...  # the model that it was trained on" in card(tmp_path / "own")[0]


def test_each_of_several_adapters_has_one_and_those_of_other_methods_have_none(tmp_path):
    model = adapted(CONFIGS["spp"])
    model.add_adapter("other", SppConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "| `r` | 4 |" in card(tmp_path)[0] and "| `r` | 2 |" in card(tmp_path / "other")[0]
    adapted(LoraConfig()).save_pretrained(tmp_path / "lora")
    assert MARK not in card(tmp_path / "lora")[0]
