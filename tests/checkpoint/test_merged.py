"""What merging gives writes its card when it is saved, in whatever way it is saved."""

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_sparse import PstConfig, SppConfig
from peft_sparse.checkpoint import load_sparse, merge_checkpoint, pack_checkpoint, save_sparse, unpack_checkpoint
from peft_sparse.checkpoint.card import MARK
from peft_sparse.checkpoint.new_folder import save_model
from peft_sparse.evaluation import sparsity_report
from peft_sparse.linears import pack_model, unpack_model
from peft_sparse.pruning import prune_magnitude

import models

CONFIGS = {"spp": SppConfig(r=4), "pst": PstConfig(r=2, score_r=2, sparsity=0.5, schedule="constant")}


def merge(base, config=CONFIGS["spp"]):
    return get_peft_model(base, config).merge_and_unload()


def pruned():
    model = prune_magnitude(models.tiny_llama(), "2:4")
    model.name_or_path = "owner/base"
    return model


def card_of(folder: Path):
    card = ModelCard.load(folder / "README.md")
    return card.text, card.data


@pytest.mark.parametrize("method", CONFIGS)
def test_save_pretrained_writes_the_card(method, tmp_path):
    merged = merge(pruned(), CONFIGS[method])
    merged.save_pretrained(tmp_path)
    text, data = card_of(tmp_path)
    assert data.base_model == "owner/base"
    assert {"sparse", "pruned", method} <= set(data.tags)
    assert f"{sparsity_report(merged).total_sparsity:.2%} of the weights" in text
    assert "| down_proj | 2 of 32 x 48 |" in text
    size = (tmp_path / "model.safetensors").stat().st_size
    assert f"take {size / 1e6:,.1f} MB on disk; as plain dense tensors" in text
    assert "LlamaForCausalLM.from_pretrained(" in text
    assert {"spp": "2405.16057", "pst": "2205.11005"}[method] in text
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in merged.state_dict().items())


def test_the_card_says_where_a_model_is_from_however_it_travelled(tmp_path):
    """Dense, packed, loaded, saved: config.json keeps the base model and the method."""
    merge(pruned()).save_pretrained(tmp_path / "0")
    save_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "0"), tmp_path / "1")
    save_sparse(load_sparse(tmp_path / "1", packed=True), tmp_path / "2")
    merge(load_sparse(tmp_path / "2"), CONFIGS["pst"]).save_pretrained(tmp_path / "3")
    for folder, method in (("0", "spp"), ("1", "spp"), ("2", "spp"), ("3", "pst")):
        data = card_of(tmp_path / folder)[1]
        assert data.base_model == "owner/base"
        assert method in data.tags
    save_sparse(load_sparse(tmp_path / "1"), tmp_path / "4", base_model="another/base", method="pst")
    assert card_of(tmp_path / "4")[1].base_model == "another/base"
    assert load_sparse(tmp_path / "4").config.peft_sparse["method"] == "pst"


def test_a_card_of_ones_own_stays(tmp_path):
    merged = merge(pruned())
    merged.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    merged.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_an_empty_form_is_nobodys_own(tmp_path):
    """PEFT leaves one beside an adapter, and people save the merged model there."""
    get_peft_model(pruned(), LoraConfig()).save_pretrained(tmp_path)
    assert MARK not in (tmp_path / "README.md").read_text()
    merge(pruned()).save_pretrained(tmp_path)
    assert MARK in (tmp_path / "README.md").read_text()


def test_only_one_process_writes(tmp_path):
    merge(pruned()).save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a" / "README.md").exists()


@pytest.mark.usefixtures("transformers_adapters")
def test_an_adapter_gets_no_card(tmp_path):
    merged = merge(pruned())
    merged.add_adapter(LoraConfig(target_modules=["q_proj"]))
    merged.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "adapter_config.json").exists()
    assert not (tmp_path / "b" / "config.json").exists()
    if (tmp_path / "b" / "README.md").exists():
        assert MARK not in (tmp_path / "b" / "README.md").read_text()


def test_on_a_packed_base(tmp_path):
    merged = merge(pack_model(pruned()))
    with pytest.raises(ValueError, match="got a packed model"):
        merged.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="got a packed model"):
        merged.push_to_hub("owner/name")  # before a repository is made
    save_sparse(merged, tmp_path / "a")
    assert "spp" in card_of(tmp_path / "a")[1].tags
    unpack_model(merged).save_pretrained(tmp_path / "b")
    assert "spp" in card_of(tmp_path / "b")[1].tags
    pack_model(merged)
    with pytest.raises(ValueError, match="got a packed model"):
        merged.save_pretrained(tmp_path / "c")


@pytest.mark.parametrize("packed", [True, False])
def test_what_was_tuned_packed_is_saved_as_asked(packed, tmp_path):
    """A recipe with `model.packed` and a dense output: plain transformers would draw the linears at random."""
    expected = {name: tensor.clone() for name, tensor in pruned().state_dict().items()}
    merged = merge(pack_model(pruned()))
    save_model(merged, tmp_path / "saved", packed, tokenizer_from=tmp_path)
    again = (load_sparse if packed else AutoModelForCausalLM.from_pretrained)(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in expected.items())
    assert "spp" in card_of(tmp_path / "saved")[1].tags


@pytest.mark.parametrize("config", [SppConfig(r=4), LoraConfig(r=4)], ids=["spp", "lora"])
def test_a_conversion_to_dense_weights_writes_the_card(config, tmp_path):
    pruned().save_pretrained(tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "a")
    merge_checkpoint(tmp_path / "a", tmp_path / "merged")
    pack_checkpoint(tmp_path / "base", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    for name in ("merged", "unpacked"):
        text, data = card_of(tmp_path / name)
        assert MARK in text and "pruned" in data.tags and data.library_name == "transformers"
        assert f"{sparsity_report(tmp_path / name).total_sparsity:.2%} of the weights" in text


def test_copies_and_pickles_save_themselves(tmp_path):
    merged = merge(pruned())
    copied = copy.deepcopy(merged)
    torch.save(merged, tmp_path / "pickled")
    read = torch.load(tmp_path / "pickled", weights_only=False)
    for number, model in enumerate((copied, read)):
        model.model.norm.weight.data.fill_(number + 2)
        model.save_pretrained(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(again.model.norm.weight, model.model.norm.weight)
        assert MARK in (tmp_path / str(number) / "README.md").read_text()
    assert type(merged).save_pretrained is type(models.tiny_llama()).save_pretrained  # the class is as it was


def test_a_card_cites_what_was_used(tmp_path):
    save_sparse(prune_magnitude(models.tiny_llama(), "2:4"), tmp_path / "pruned")
    text = card_of(tmp_path / "pruned")[0]
    assert ", pruned with magnitude pruning. 50" in text and "1506.02626" in text
    assert "2405.16057" not in text and "2205.11005" not in text
    merge(load_sparse(tmp_path / "pruned")).save_pretrained(tmp_path / "tuned")
    text = card_of(tmp_path / "tuned")[0]
    assert (
        ", pruned with magnitude pruning, tuned with SPP (" in text and "1506.02626" in text and "2405.16057" in text
    )
    save_sparse(models.tiny_llama(), tmp_path / "unknown")
    assert "Citation" not in card_of(tmp_path / "unknown")[0]
