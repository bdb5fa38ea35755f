"""From one folder to another: the same bits, and all that belongs to the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_sparse.checkpoint import pack_checkpoint, unpack_checkpoint
from peft_sparse.pruning import prune_magnitude

import models


@pytest.fixture
def dense(tmp_path) -> Path:
    prune_magnitude(models.tiny_llama(), "2:4").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("says", ["bfloat16", "float32", None])
def test_pack_and_unpack_keep_the_dtype_of_each_tensor(says, dense, tmp_path):
    """Whatever config.json says, by which transformers rounds them all alike."""
    tensors = load_file(dense / "model.safetensors")
    for name in tensors:
        if name != "lm_head.weight" and "norm" not in name:
            tensors[name] = tensors[name].to(torch.bfloat16 if "self_attn" in name else torch.float16)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text()) | {"dtype": says}
    (dense / "config.json").write_text(json.dumps(config))
    pack_checkpoint(dense, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in again.items()} == {name: x.dtype for name, x in tensors.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("task", [None, "causal_lm"])
def test_a_model_with_code_of_its_own_keeps_it(task, dense, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (dense / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (dense / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnLM"}
    config = json.loads((dense / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnLM"], "auto_map": classes}
    (dense / "config.json").write_text(json.dumps(config))
    pack_checkpoint(dense, tmp_path / "packed", task=task, trust_remote_code=True)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again", trust_remote_code=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again).__name__ == "OwnLM" and isinstance(again, LlamaForCausalLM)


def test_what_cannot_be_packed(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    for change, said in (
        (("config.json", config | {"quantization_config": {"quant_method": "gptq"}}), "got a quantized model"),
        (("adapter_config.json", {}), "without adapters"),
    ):
        (dense / change[0]).write_text(json.dumps(change[1]))
        with pytest.raises(ValueError, match=said):
            pack_checkpoint(dense, tmp_path / "packed")
        (dense / "config.json").write_text(json.dumps(config))
    assert not (tmp_path / "packed").exists()
