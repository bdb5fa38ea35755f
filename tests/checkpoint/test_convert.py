"""From one folder to another: the same bits, and all that belongs to the model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from renamed import zamba
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_sparse import SppConfig
from peft_sparse.checkpoint import (
    load_sparse,
    merge_checkpoint,
    pack_checkpoint,
    prune_checkpoint,
    unpack_checkpoint,
)
from peft_sparse.pruning import prune_magnitude
from peft_sparse.storage.format import config_crc32

import models


@pytest.fixture
def dense(tmp_path) -> Path:
    prune_magnitude(models.tiny_llama(), "2:4").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "nope"), ("architectures", ["Nope"]), ("hidden_size", 40)]
)
def test_a_dry_run_refuses_what_a_run_would(field, value, dense, tmp_path):
    """A config that no model can be made of, or one of other shapes."""
    settings = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(settings | {field: value}))
    for dry_run in (False, True):
        with pytest.raises(ValueError, match=r"nope|Nope|, here \("):
            pack_checkpoint(dense, tmp_path / "new", dry_run=dry_run)


@pytest.mark.parametrize("names", [None, []])
def test_a_config_without_a_class_says_where_to_write_it(names, dense, tmp_path):
    settings = json.loads((dense / "config.json").read_text()) | {"architectures": names}
    (dense / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r'got none in .*; write it there, as "architectures": \["Llama'):
        pack_checkpoint(dense, tmp_path / "new")


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


def test_what_transformers_keeps_in_float32_is_written_as_it_was_stored(tmp_path):
    """But loaded as `from_pretrained` loads it."""
    model = prune_magnitude(zamba(), "2:4").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = type(model).from_pretrained(tmp_path / "dense").state_dict()
    ours = load_sparse(tmp_path / "packed").state_dict()
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16, torch.float32}
    assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in plain.items()}


def test_a_task_tells_the_class_of_a_packed_model_that_does_not(dense, tmp_path):
    """One whose config.json names a class that is not transformers' own."""
    packed = tmp_path / "packed"
    pack_checkpoint(dense, packed)
    config = json.loads((packed / "config.json").read_text()) | {"architectures": ["Nope"]}
    config["peft_sparse"]["crc32"] = config_crc32(config)
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Nope"):
        unpack_checkpoint(packed, tmp_path / "again")
    with pytest.raises(ValueError, match="`task` is one of"):
        unpack_checkpoint(packed, tmp_path / "again", task="nope", dry_run=True)
    unpack_checkpoint(packed, tmp_path / "again", task="causal_lm")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


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


# What the tokenizers of transformers call their files, beside `tokenizer.json` and `vocab.txt`, and other companions.
COMPANIONS = [
    "spm.model", "spm_char.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "source.spm",
    "target.spm", "target_vocab.json", "vocab-src.json", "bpe.codes", "dict.txt", "entity_vocab.json",
    "normalizer.json", "prophetnet.tokenizer", "byte_maps.json", "word_shape.json", "emoji.json", "qwen.tiktoken",
    "tokenization_own.py", "preprocessor_config.json", "chat_template.jinja", "special_tokens_map.json",
    "merges.txt", "vocab.json", "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
OTHERS = [
    "pytorch_model.bin", "optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "model.onnx",
    "pytorch_model.bin.index.json", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "modeling_other.py", "examples.csv",
    "all_results.json", "modules.json", ".gitattributes", "figure.png", "tf_model.h5",
    "peft_sparse_manifest.json", "peft_sparse_new_modules.json", "additional_chat_templates/notes.txt",
    "onnx/vocab.txt",
]  # fmt: skip


def test_whatever_belongs_to_a_tokenizer_goes_along(dense, tmp_path):
    for name in COMPANIONS + OTHERS:
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(name)
    pack_checkpoint(dense, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    prune_checkpoint(dense, tmp_path / "pruned", "magnitude")
    for folder in ("packed", "again", "pruned"):
        assert [name for name in COMPANIONS if not (tmp_path / folder / name).exists()] == []
        assert [name for name in OTHERS if (tmp_path / folder / name).exists()] == []


def test_merging_takes_the_tokenizer_of_the_adapter_or_else_of_the_base(dense, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(dense), SppConfig(r=4)).save_pretrained(adapter)
    of_base = ["vocab.json", "special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json"]
    for name in of_base:
        (dense / name).write_text("dense")
    for names, expected in (([], dict.fromkeys(of_base, "dense")), (["vocab.json"], {"vocab.json": "adapter"})):
        for name in names:
            (adapter / name).write_text("adapter")
        merge_checkpoint(adapter, merged := tmp_path / f"merged-{len(names)}")
        found = {name: (merged / name).read_text() for name in of_base if (merged / name).exists()}
        assert found == expected | {"preprocessor_config.json": "dense"}


def test_a_merged_tokenizer_is_the_adapter_s_and_nothing_of_the_base_s(tmp_path):
    """Before transformers 5 a tokenizer had files that are read if they are there."""
    base = Path(models.save_with_tokenizer(prune_magnitude(models.tiny_llama(), sparsity=0.5), tmp_path / "base"))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "w5", "pad_token": "w6"}))
    (base / "chat_template.jinja").write_text("old")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), SppConfig(r=4, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "w7", "w8", None
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.eos_token, merged.pad_token, merged.chat_template) == ("w7", "w8", None)


def test_the_tokenizer_of_a_base_on_the_hub(dense, tmp_path, monkeypatch):
    """One that was downloaded before, as is a base that an adapter's config names."""
    snapshot = tmp_path / "hub" / "models--owner--base" / "snapshots" / ("a" * 40)
    (dense / "spm.model").write_text("pieces")
    shutil.copytree(dense, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained("owner/base"), SppConfig(r=4, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    pack_checkpoint("owner/base", tmp_path / "packed")
    prune_checkpoint("owner/base", tmp_path / "pruned", "magnitude", sparsity=0.75)
    for folder in ("merged", "packed", "pruned"):
        assert (tmp_path / folder / "spm.model").read_text() == "pieces"


@pytest.mark.parametrize("excluded", [None, ["q_proj"]])
def test_a_dry_run_names_the_pattern_that_a_run_finds(excluded, dense, tmp_path):
    found = [
        prune_checkpoint(
            dense, tmp_path / "new", "magnitude", pattern="1:4", exclude_modules=excluded, dry_run=dry_run
        )
        for dry_run in (True, False)
    ]
    assert [one.pattern for one in found] == ["1:4" if excluded is None else "mixed"] * 2
    assert found[0].zeros == found[1].zeros
