"""A packed checkpoint gives the model that a dense one gives, bit for bit, and is smaller."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse.checkpoint import load_sparse, save_sparse
from peft_sparse.evaluation import sparsity_report, verify_sparsity
from peft_sparse.linears import PackedLinear, block_linears, unpack_model
from peft_sparse.pruning import prune_magnitude, prune_wanda

import models

INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SMALL_LLAMA = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4
}


def tied_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA, tie_word_embeddings=True))


def t5() -> T5ForConditionalGeneration:
    """Tied three times over, and with relative positions that only the first block has."""
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def headless_bert() -> BertModel:
    return BertModel(BertConfig(**BERT))


def mixtral() -> MixtralForCausalLM:
    """Its experts are one tensor in memory and many on disk."""
    return MixtralForCausalLM(MixtralConfig(**SMALL_LLAMA, num_local_experts=2))


FACTORIES = [models.tiny_llama, models.tiny_gpt2, models.tiny_bert, tied_llama, headless_bert, t5, mixtral]


def assert_same_bits(model: nn.Module, expected: nn.Module, buffers: bool = True) -> None:
    """Parameters and buffers, persistent or not, and which of them are the same tensor."""
    for kind in ("named_parameters", "named_buffers")[: 1 + buffers]:
        got = dict(getattr(model, kind)(remove_duplicate=False))
        want = dict(getattr(expected, kind)(remove_duplicate=False))
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype, name
            same = torch.equal(as_ints(got[name]), as_ints(tensor))
            assert same, name
        assert ties(got) == ties(want)


def as_ints(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(INTS[tensor.dtype]) if tensor.dtype in INTS and tensor.dim() else tensor


def ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(groups.values())


def both(model, tmp_path: Path, **kwargs) -> tuple:
    """(loaded from packed, loaded from dense)."""
    save_sparse(model, tmp_path / "packed", **kwargs)
    model.save_pretrained(tmp_path / "dense")
    return load_sparse(tmp_path / "packed"), type(model).from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize("dtype", INTS, ids=str)
@pytest.mark.parametrize("factory", FACTORIES)
def test_the_same_model_as_a_dense_load(factory, dtype, tmp_path):
    model = prune_magnitude(factory().to(dtype), sparsity=0.75)
    loaded, expected = both(model, tmp_path)
    assert type(loaded) is type(expected)
    assert not loaded.training
    assert_same_bits(loaded, expected)
    ours, theirs = loaded.config.to_dict(), expected.config.to_dict()
    assert ours.pop("_name_or_path") == str(tmp_path / "packed")
    assert theirs.pop("_name_or_path") == str(tmp_path / "dense")
    assert ours == theirs
    if loaded.can_generate():
        assert loaded.generation_config == expected.generation_config


def test_other_dtypes_on_request(tiny_llama, tmp_path):
    prune_magnitude(tiny_llama, sparsity=0.75)
    _, _ = both(tiny_llama, tmp_path)
    loaded = load_sparse(tmp_path / "packed", dtype=torch.bfloat16, device="cpu")
    assert_same_bits(loaded, LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_every_bit_survives(dtype, tmp_path):
    """Negative zeros, infinities, denormal numbers, and each NaN with its payload."""
    model = prune_magnitude(models.tiny_llama().to(dtype), sparsity=0.9)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    ints = weight.view(INTS[dtype])
    ints[0, :8] = torch.randint(-(2**15), 2**15, (8,)).to(ints.dtype)
    weight[1, :6] = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    ints[2, 0] = 0x7FC12345 if dtype == torch.float32 else 0x7FD3  # a NaN with a payload
    ints[2, 1] = 1  # the smallest number there is
    loaded, expected = both(model, tmp_path)
    assert_same_bits(loaded, model, buffers=False)  # `.to(dtype)` rounded some, which a load keeps in float32
    assert_same_bits(loaded, expected)
    with safe_open(tmp_path / "packed" / "sparse_model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.up_proj.weight.bitmask" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, mixtral])
def test_each_tensor_comes_back_in_its_own_dtype(factory, packed, tmp_path):
    """Norms, a head and one linear in float32 in a bfloat16 model: a load by the model's dtype would round them."""
    model = factory().to(torch.bfloat16)
    inside = list(block_linears(model).values())
    others = [x for x in model.modules() if isinstance(x, nn.LayerNorm) or "RMSNorm" in type(x).__name__]
    for module in (*others, inside[-1], *(x for x in model.modules() if hasattr(x, "gate_up_proj"))):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.randn(parameter.shape)
    prune_magnitude(model, sparsity=0.75)
    save_sparse(model, tmp_path / "a")
    loaded = load_sparse(tmp_path / "a", packed=packed, dtype="auto" if packed else None)
    assert sum(isinstance(linear, PackedLinear) for linear in block_linears(loaded).values()) == packed * len(inside)
    assert_same_bits(unpack_model(loaded), model, buffers=False)
    assert {x.dtype for x in load_sparse(tmp_path / "a", dtype="float16").parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_zeros_that_a_product_with_a_mask_leaves(dtype, tmp_path):
    """Half of them are negative, and would take as much room as weights."""
    model = models.tiny_llama().to(dtype)
    for linear in block_linears(model).values():
        linear.weight.data.mul_(torch.rand(linear.weight.shape) < 0.25)
        assert (linear.weight.view(INTS[dtype]) < 0).sum() > (linear.weight < 0).sum()  # negative zeros
    with pytest.warns(UserWarning, match=r"zeros in 14 tensors are negative, as `weight \* mask` leaves them"):
        save_sparse(model, tmp_path)
    loaded = load_sparse(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with safe_open(tmp_path / "sparse_model.safetensors", "pt") as file:
        for name, linear in block_linears(model).items():
            assert file.get_tensor(f"{name}.weight.values").numel() == linear.weight.count_nonzero()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sparse(loaded, tmp_path)


def test_plain_transformers_raises(tmp_path):
    save_sparse(prune_magnitude(tied_llama()), tmp_path / "one")
    save_sparse(prune_magnitude(tied_llama()), tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for folder in ("one", "many"):
        for auto_cls in (AutoModel, AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.raises(OSError, match=r"no file named model.safetensors"):
                auto_cls.from_pretrained(tmp_path / folder)


def test_shards(tmp_path):
    model = prune_magnitude(tied_llama(), sparsity=0.5)
    save_sparse(model, tmp_path, max_shard_size=30_000)
    files = sorted(tmp_path.glob("sparse_model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "sparse_model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert max(file.stat().st_size for file in files) < 40_000
    assert_same_bits(load_sparse(tmp_path), model)
    save_sparse(model, tmp_path)  # in one file: nothing of the shards is left
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "sparse_model.safetensors",
    }
    assert_same_bits(load_sparse(tmp_path), model)


def test_files_of_others_stay(tmp_path):
    """Also those whose names begin as ours do."""
    model = prune_magnitude(tied_llama(), sparsity=0.5)
    names = ("notes.txt", "_notes.txt", "s.csv", ".onnx", "_old.safetensors", "-1-of-2.safetensors")
    others = {f"sparse_model{name}" for name in names}
    for name in others:
        (tmp_path / name).write_text(name)
    save_sparse(model, tmp_path, max_shard_size=30_000)
    shards = {path.name for path in tmp_path.glob("sparse_model-*-of-0*.safetensors")}
    save_sparse(model, tmp_path)
    assert len(shards) > 2 and not shards & {path.name for path in tmp_path.iterdir()}
    assert all((tmp_path / name).read_text() == name for name in others)
    assert_same_bits(load_sparse(tmp_path), model)


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [(torch.float32, {0.5: 0.54, 0.75: 0.29, 0.9: 0.14}), (torch.bfloat16, {0.5: 0.57, 0.75: 0.32, 0.9: 0.17})],
    ids=str,
)
def test_sizes(dtype, bounds, tmp_path):
    config = LlamaConfig(**SMALL_LLAMA | {"hidden_size": 128, "intermediate_size": 256})
    for sparsity, bound in bounds.items():
        model = prune_magnitude(LlamaForCausalLM(config).to(dtype), sparsity=sparsity)
        save_sparse(model, tmp_path / str(sparsity))
        packed = dense = 0
        with safe_open(tmp_path / str(sparsity) / "sparse_model.safetensors", "pt") as file:
            for name in (name for name, _ in model.named_parameters() if "_proj" in name):
                packed += sum(file.get_tensor(name + part).nbytes for part in (".values", ".bitmask"))
                dense += model.get_parameter(name).nbytes
        assert packed / dense <= bound


def test_what_does_not_become_smaller_stays_as_it_is(tiny_llama, tmp_path):
    """At 5% zeros a bitmask costs more than it saves in bf16, at any sparsity for a vector."""
    model = prune_magnitude(tiny_llama.to(torch.bfloat16), sparsity=0.05)
    model.model.norm.weight.data.zero_()
    save_sparse(model, tmp_path)
    with safe_open(tmp_path / "sparse_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["peft_sparse"]["modules"] == {}
    assert_same_bits(load_sparse(tmp_path), model, buffers=False)


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2])
def test_config_says_what_is_packed(factory, tmp_path):
    model = prune_magnitude(factory(), "2:4")
    save_sparse(model, tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())["peft_sparse"]
    report = sparsity_report(model)
    assert (ours["format"], ours["version"], ours["sparsity"]) == ("bitmask", 1, 0.5)
    assert ours["modules"] == {layer.name: {"pattern": "2:4", "sparsity": 0.5} for layer in report.layers}
    assert sparsity_report(tmp_path).layers == report.layers
    assert verify_sparsity(tmp_path, reference=model).ok


def test_a_loaded_model_saves_again(tmp_path):
    model = prune_magnitude(tied_llama(), "2:4")
    save_sparse(model, tmp_path / "packed")
    loaded = load_sparse(tmp_path / "packed")
    save_sparse(loaded, tmp_path / "again")
    first, again = ((tmp_path / name / "sparse_model.safetensors").read_bytes() for name in ("packed", "again"))
    assert first == again
    save_sparse(loaded, tmp_path / "packed")  # over the very files that it was read from
    assert_same_bits(load_sparse(tmp_path / "packed"), model)
    assert_same_bits(loaded, model)
    loaded.save_pretrained(tmp_path / "dense")
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), model)
    entry = json.loads((tmp_path / "dense" / "config.json").read_text())["peft_sparse"]
    assert entry == model.config.peft_sparse and set(entry) == {"pruning"}  # how it was pruned, not how it was stored


def test_tokenizer_and_generation_config(llama_dir, tmp_path):
    model = prune_magnitude(AutoModelForCausalLM.from_pretrained(llama_dir), sparsity=0.5)
    model.generation_config.max_new_tokens = 7
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama_dir)
    save_sparse(model, tmp_path / "packed", tokenizer=tokenizer)
    loaded = load_sparse(tmp_path / "packed")
    assert loaded.generation_config.max_new_tokens == 7
    text = "Once upon a time"
    ids = PreTrainedTokenizerFast.from_pretrained(tmp_path / "packed")(text, return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer(text, return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["torch_dtype", "device_map", "dtpye", "allow_patterns"])
def test_arguments_that_nobody_takes(name, tiny_llama, tmp_path):
    """`torch_dtype` among the arguments of a download would be passed over in silence."""
    save_sparse(prune_magnitude(tiny_llama), tmp_path)
    with pytest.raises(TypeError, match=rf"got `{name}`; .* are `dtype` and `device` here"):
        load_sparse(tmp_path, **{name: "auto"})
    load_sparse(tmp_path, revision="main", token=False, local_files_only=True)


@pytest.mark.parametrize("packed", [True, False])
def test_auto_classes_and_other_heads(packed, tmp_path):
    model = prune_magnitude(models.tiny_llama(), sparsity=0.6)
    save_sparse(model, tmp_path)
    assert type(load_sparse(tmp_path, packed=packed, model_cls=AutoModelForCausalLM)) is LlamaForCausalLM
    headless = load_sparse(tmp_path, packed=packed, model_cls=AutoModel)
    assert type(headless) is LlamaModel
    with torch.no_grad():
        ids = torch.arange(8)[None]
        torch.testing.assert_close(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)
    with pytest.warns(UserWarning, match=r"new and random, and has to be trained: \['score.weight'\]"):
        classifier = load_sparse(tmp_path, packed=packed, model_cls=AutoModelForSequenceClassification)
    assert sparsity_report(classifier).total_zeros == sparsity_report(model).total_zeros
    save_sparse(headless, tmp_path / "headless")
    with pytest.warns(UserWarning, match=r"new and random, and has to be trained: \['lm_head.weight'\]"):
        again = load_sparse(tmp_path / "headless", packed=packed, model_cls=LlamaForCausalLM)
    assert sparsity_report(again).total_zeros == sparsity_report(model).total_zeros
    for wrong in (BertModel, AutoModelForImageClassification):
        with pytest.raises(ValueError, match=rf"whose config is a LlamaConfig, got {wrong.__name__}"):
            load_sparse(tmp_path, packed=packed, model_cls=wrong)


class OwnLlama(LlamaForCausalLM):
    """A class that transformers has not."""


def test_a_class_of_ones_own(tmp_path):
    save_sparse(prune_magnitude(OwnLlama(LlamaConfig(**SMALL_LLAMA))), tmp_path)
    with pytest.raises(ValueError, match=r"got 'OwnLlama' .* `model_cls`"):
        load_sparse(tmp_path)
    assert type(load_sparse(tmp_path, model_cls=OwnLlama)) is OwnLlama


def test_models_that_are_refused(tiny_llama, tmp_path):
    peft_model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    for model in (peft_model, peft_model.get_base_model()):
        with pytest.raises(ValueError, match=r"got adapters .*`model = model.merge_and_unload\(\)`"):
            save_sparse(model, tmp_path / "new")
    with pytest.raises(ValueError, match="models of transformers, got Linear"):
        save_sparse(nn.Linear(2, 2), tmp_path / "new")
    with pytest.raises(ValueError, match="models of transformers, got str"):
        save_sparse("folder", tmp_path / "new")
    model = peft_model.merge_and_unload()
    for size in ("many", "0", 0, -1, True, "5 PB"):
        with pytest.raises(ValueError, match="`max_shard_size` is a number of bytes"):
            save_sparse(model, tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()
    save_sparse(model, tmp_path / "new")


def test_compiled_models(tiny_llama, tmp_path):
    """As a whole or block by block; one that is compiled in place has its own names."""
    with pytest.raises(ValueError, match=r"got all of it wrapped by `torch.compile`; save `model._orig_mod`"):
        save_sparse(torch.compile(tiny_llama, backend="eager"), tmp_path / "new")
    block = tiny_llama.model.layers[1]
    tiny_llama.model.layers[1] = torch.compile(block, backend="eager")
    with pytest.raises(ValueError, match=r"got `model.layers.1` wrapped .*; put its `_orig_mod` back in its place"):
        save_sparse(tiny_llama, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tiny_llama.model.layers[1] = block
    block.compile(backend="eager")
    save_sparse(tiny_llama, tmp_path / "new")
    assert_same_bits(load_sparse(tmp_path / "new"), tiny_llama)


def test_folders_that_are_refused(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no dense weights beside it, .* got 'model.safetensors'"):
        save_sparse(tiny_llama, tmp_path)
    with pytest.raises(ValueError, match=r"a folder, got .* which is a file"):
        save_sparse(tiny_llama, tmp_path / "config.json")
    with pytest.raises(ValueError, match="reads packed checkpoints, got a dense one"):
        load_sparse(tmp_path)
    with pytest.raises(ValueError, match="a folder, got"):
        load_sparse(tmp_path / "nowhere")


def test_a_dense_save_into_a_packed_folder_is_noticed(tiny_llama, tmp_path):
    save_sparse(prune_magnitude(tiny_llama), tmp_path)
    packed_config = (tmp_path / "config.json").read_bytes()
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a dense one"):
        load_sparse(tmp_path)
    (tmp_path / "config.json").write_bytes(packed_config)
    with pytest.raises(ValueError, match=r"no other weights, got 'model.safetensors' beside"):
        load_sparse(tmp_path)


def test_what_the_pruner_wrote_down_stays(tmp_path):
    model = prune_wanda(
        models.tiny_llama(), [{"input_ids": torch.arange(16)[None]}], measure_error=True, progress=False
    )
    facts = model.config.peft_sparse
    assert set(facts) == {"pruning"}
    model.save_pretrained(tmp_path / "dense")  # an entry of the same name as a packed folder's, and no packed folder
    save_sparse(model, tmp_path / "packed")
    loaded = load_sparse(tmp_path / "packed")
    assert loaded.config.peft_sparse == facts
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for source in (model, tmp_path / "dense", tmp_path / "packed", loaded, tmp_path / "again", again):
        layers = sparsity_report(source).layers
        assert {layer.name: layer.error for layer in layers} == facts["pruning"]["errors"]
        assert " error\n" in str(sparsity_report(source))
    assert verify_sparsity(tmp_path / "packed", reference=tmp_path / "dense").ok
