"""Tensors that transformers does not load are not in a result, and that is told."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, LlamaForSequenceClassification

from peft_sparse import SppConfig
from peft_sparse.checkpoint import merge_checkpoint, pack_checkpoint, prune_checkpoint
from peft_sparse.pruning import prune_magnitude

import models

EXTRA = ("model.layers.46.eh_proj.weight", "model.layers.46.mlp.experts.0.gate_proj.weight")


def add_tensors(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(32, 64) for name in names}, path, metadata={"format": "pt"})


@pytest.fixture
def glm(tmp_path) -> Path:
    """Its class ignores `model.layers.46.*`, its layer for multi-token prediction, in silence."""
    config = Glm4MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "glm")
    add_tensors(tmp_path / "glm", *EXTRA)
    return tmp_path / "glm"


@pytest.fixture
def llama(tmp_path) -> Path:
    prune_magnitude(models.tiny_llama(), "2:4").save_pretrained(tmp_path / "llama")
    add_tensors(tmp_path / "llama", *EXTRA)
    return tmp_path / "llama"


@pytest.mark.filterwarnings("ignore:Only linears are pruned")
@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("source", ["glm", "llama"])
def test_what_a_model_has_no_place_for_is_named(source, dry_run, tmp_path, request):
    folder, size = request.getfixturevalue(source), 2 * 32 * 64 * 4
    told = rf"no place for tensors in .* \(2, {size / 1e6:.2f} MB\), .* {EXTRA[0]}, {EXTRA[1]}\."
    with pytest.warns(UserWarning, match=told):
        packed = pack_checkpoint(folder, tmp_path / "packed", dry_run=dry_run)
    with pytest.warns(UserWarning, match=told):
        pruned = prune_checkpoint(folder, tmp_path / "pruned", "magnitude", dry_run=dry_run)
    assert packed.left_out == pruned.left_out == list(EXTRA)
    assert packed.bytes_before - packed.bytes_after > size / 2


def test_merge_tells_of_it_but_for_a_head_of_another_class(llama, tmp_path):
    for model_cls, task_type in ((None, "CAUSAL_LM"), (LlamaForSequenceClassification, "SEQ_CLS")):
        base = (model_cls or type(models.tiny_llama())).from_pretrained(llama)
        get_peft_model(base, SppConfig(task_type=task_type)).save_pretrained(tmp_path / task_type)
    with pytest.warns(UserWarning, match="no place for tensors in"):
        merged, _ = merge_checkpoint(tmp_path / "CAUSAL_LM", tmp_path / "merged", dry_run=True)
    assert merged.left_out == list(EXTRA)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no place")
        assert merge_checkpoint(tmp_path / "SEQ_CLS", tmp_path / "merged", dry_run=True)[0].left_out == []


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias"])
def test_what_a_model_makes_anew_is_not_missed(name, tmp_path):
    models.tiny_llama().save_pretrained(tmp_path / "llama")
    add_tensors(tmp_path / "llama", name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no place")
        assert pack_checkpoint(tmp_path / "llama", tmp_path / "packed").left_out == []
