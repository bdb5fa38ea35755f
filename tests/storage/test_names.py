"""Names in files and in models, for those that transformers renames on the way."""

import pytest
import torch
from renamed import RENAMED, mixtral, vit
from safetensors import safe_open
from transformers import GPT2Model, ViTForImageClassification

from peft_sparse.linears import block_experts, block_linears
from peft_sparse.storage import as_in_files, names_in_model
from peft_sparse.storage.origin import facts_of, hub_name, record_facts

import models


@pytest.mark.parametrize("make", RENAMED)
def test_the_linears_of_a_folder_are_found(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = list(file.keys())
        wanted = names_in_model(model, keys)
        for key, (name, converted) in wanted.items():
            if not converted:
                assert torch.equal(file.get_tensor(key), model.state_dict()[name]), key
    found = {name for name, _ in wanted.values()}
    assert {f"{name}.weight" for name in block_linears(model)} | set(block_experts(model)) <= found
    assert set(wanted) == set(keys)


@pytest.mark.parametrize("make", RENAMED)
def test_there_and_back(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, parameter in model.named_parameters():
            for key, part in as_in_files(model, name, parameter.detach()).items():
                assert torch.equal(part, file.get_tensor(key)), (name, key)


def test_experts_are_taken_apart():
    model = mixtral()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = as_in_files(model, name, model.get_parameter(name).detach())
    assert len(parts) == 4  # two matrices of two experts
    assert sum(part.numel() for part in parts.values()) == model.get_parameter(name).numel()


def test_a_base_model_has_no_prefix():
    model = models.tiny_gpt2()
    base = GPT2Model(model.config)
    for here, there in ((model, base), (base, model)):
        names = names_in_model(here, there.state_dict())
        assert {name for name, _ in names.values()} == here.state_dict().keys() - {"lm_head.weight"}
    assert names_in_model(base, ["nothing.weight"]) == {}


def test_what_is_known_about_a_model():
    model = ViTForImageClassification(vit().config)
    record_facts(model, method="spp", pruning=None)
    assert model.config.peft_sparse == {"method": "spp"}
    model.name_or_path = "owner/name"
    record_facts(model, pruning={"method": "magnitude"})
    assert model.config.peft_sparse == {
        "method": "spp",
        "base_model": "owner/name",
        "pruning": {"method": "magnitude"},
    }
    model.name_or_path = "another/name"  # it was saved and loaded on the way
    record_facts(model, method="pst")
    assert model.config.peft_sparse["base_model"] == "owner/name"
    assert facts_of({"format": "bitmask", "method": "pst"}) == {"method": "pst"}
    assert facts_of("something else") == {}
    record_facts(torch.nn.Linear(2, 2), method="spp")  # no config: nothing to write to


@pytest.mark.parametrize("name", ["", ".", "a", "a/b/c", "/a/b", "./a", "a//b", "../a", None])
def test_what_is_no_name_on_the_hub(name):
    assert hub_name(name) is None


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_name("owner/name") is None
