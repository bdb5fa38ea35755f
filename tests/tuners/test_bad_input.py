"""Bad input: an error with the rule, the value met and the way out, before anything is changed."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sparse import PstConfig, SppConfig
from peft_sparse.pruning import prune_magnitude

from models import tiny_bert, tiny_gpt2, tiny_llama

CONFIG_ERRORS = {
    "sparsity 1": (PstConfig, {"sparsity": 1.0}, r"lies in \[0, 1\), got 1.0"),
    "sparsity above 1": (PstConfig, {"sparsity": 90}, r"lies in \[0, 1\), got 90; 0.9 means"),
    "negative sparsity": (PstConfig, {"sparsity": -0.1}, r"lies in \[0, 1\), got -0.1"),
    "sparsity as text": (PstConfig, {"sparsity": "0.9"}, r"lies in \[0, 1\), got '0.9'"),
    "sparsity NaN": (PstConfig, {"sparsity": float("nan")}, r"lies in \[0, 1\), got nan"),
    "initial sparsity": (PstConfig, {"initial_sparsity": 1.5}, r"`initial_sparsity`.*got 1.5"),
    "a falling ramp": (PstConfig, {"initial_sparsity": 0.5, "sparsity": 0.4}, "got initial_sparsity=0.5 above"),
    "sparsity beside N:M": (
        PstConfig,
        {"pattern": "2:4", "sparsity": 0.9},
        "fixes the sparsity at 0.5, got .*0.9; leave",
    ),
    "4:2": (PstConfig, {"pattern": "4:2"}, r"0 < N < M, got 4:2; for example '2:4'"),
    "0:4": (PstConfig, {"pattern": "0:4"}, r"0 < N < M, got 0:4"),
    "4:4": (PstConfig, {"pattern": "4:4"}, r"0 < N < M, got 4:4"),
    "a:b": (PstConfig, {"pattern": "a:b"}, r"'unstructured' or 'N:M'.*got 'a:b'"),
    "no pattern": (PstConfig, {"pattern": ""}, r"'unstructured' or 'N:M'.*got ''"),
    "pattern None": (PstConfig, {"pattern": None}, r"'unstructured' or 'N:M'.*got None"),
    "r 0": (PstConfig, {"r": 0}, "`r` should be a positive integer, got 0"),
    "r text": (PstConfig, {"r": "8"}, "`r` should be a positive integer, got '8'"),
    "score_r": (PstConfig, {"score_r": -1}, "`score_r` should be a positive integer, got -1"),
    "importance": (PstConfig, {"importance": "taylor"}, "'pst', 'magnitude', 'movement', got 'taylor'"),
    "schedule": (PstConfig, {"schedule": "cosine"}, "'cubic', 'linear', 'constant', got 'cosine'"),
    "update": (PstConfig, {"weight_update": "lora"}, "'low_rank', 'full', 'none', got 'lora'"),
    "nothing to train": (PstConfig, {"importance": "magnitude", "weight_update": "none"}, "prune_magnitude"),
    "warm-ups": (PstConfig, {"initial_warmup": 0.8, "final_warmup": 0.3}, r"sum to at most 1, got 0.8 \+ 0.3"),
    "warm-up": (PstConfig, {"initial_warmup": -0.1}, r"`initial_warmup` is a fraction .* got -0.1"),
    "total steps": (PstConfig, {"total_steps": 0}, "`total_steps` should be a positive integer, got 0"),
    "spp r 0": (SppConfig, {"r": 0}, "`r` should be a positive integer, got 0"),
    "spp r float": (SppConfig, {"r": 1.5}, "`r` should be a positive integer, got 1.5"),
    "spp dropout": (SppConfig, {"spp_dropout": 1.0}, r"probability in \[0, 1\), got 1.0"),
    "spp alpha": (SppConfig, {"spp_alpha": 0}, "`spp_alpha` should be above 0, got 0"),
    "pattern without layers": (SppConfig, {"layers_pattern": "h"}, "set both or neither"),
    "regex with layers": (SppConfig, {"target_modules": ".*", "layers_to_transform": [0]}, "put the block numbers"),
}


@pytest.mark.parametrize("config_cls, settings, words", CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_config(config_cls, settings, words):
    with pytest.raises(ValueError, match=words):
        config_cls(**settings)


class Odd(nn.Module):
    """Blocks whose second linear has a width that 4 does not divide."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(2))


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def llama_with_lora():
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).base_model.model


TARGET_ERRORS = {
    "width": (
        Odd,
        PstConfig(pattern="2:4"),
        r"2:4 needs in_features divisible by 4, got 6 in `layers.0.2`; exclude "
        "it",
    ),
    "no match": (tiny_llama, PstConfig(target_modules=["query"]), r"(?s)query.*not found in the base model"),
    "not a linear": (
        tiny_llama,
        PstConfig(target_modules=["input_layernorm"]),
        r"LlamaRMSNorm in "
        "`model.layers.0.input_layernorm`; take",
    ),
    "embedding": (
        tiny_llama,
        SppConfig(target_modules=["q_proj", "embed_tokens"]),
        "got Embedding in `model.embed_tokens`; take",
    ),
    "conv1d embedding": (tiny_gpt2, PstConfig(target_modules=["c_attn", "wte"]), "got Embedding in `transformer.wte`"),
    "block": (
        tiny_bert,
        SppConfig(target_modules=["attention"]),
        "got BertAttention in `bert.encoder.layer.0.attention`",
    ),
    "no blocks": (mlp, PstConfig(), "Sequential has no list of such blocks; name the linears"),
    "attention's own": (
        lambda: nn.MultiheadAttention(8, 2),
        PstConfig(target_modules=["out_proj"]),
        "got NonDynamically",
    ),
    "another method": (
        llama_with_lora,
        PstConfig(target_modules=["q_proj"]),
        "adapter of another method .*merge that",
    ),
    "all excluded": (tiny_llama, SppConfig(exclude_modules=".*"), "excluded"),
}


def snapshot(model: nn.Module) -> dict:
    return {name: (type(module), *(id(p) for p in module.parameters())) for name, module in model.named_modules()}


@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")
@pytest.mark.parametrize("build, config, words", TARGET_ERRORS.values(), ids=TARGET_ERRORS)
def test_targets(build, config, words):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config)
    assert snapshot(model) == before


def test_excluding_the_odd_width_is_the_way_out():
    model = get_peft_model(Odd(), PstConfig(pattern="2:4", exclude_modules=["2"]))
    assert sum(name.endswith("pst_pruned") for name, _ in model.named_modules()) == 2


@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned", "ignore:Merging the PST")
@pytest.mark.parametrize("config", [PstConfig(), SppConfig()], ids=["pst", "spp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_what_is_not_finite(config, value, safe_merge, merge):
    """In the last layer, so that every other one could have been merged before it."""
    model = get_peft_model(tiny_llama(), config)
    name, broken = [(n, p) for n, p in model.named_parameters() if p.requires_grad][-1]
    with torch.no_grad():
        broken.view(-1)[0] = value
        if "spp_B" in name:
            broken.fill_(value)
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    act = getattr(model if merge == "merge_and_unload" else model.base_model, merge)
    if isinstance(config, PstConfig):
        with torch.no_grad():  # a broken score ranks; a broken update breaks the weight
            model.get_submodule(name.rsplit(".", 2)[0]).pst_V["default"].view(-1)[0] = value
            state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaNs detected.*seems to be broken.*of 1536 in `.*`; train with a lower"):
        act(safe_merge=safe_merge)
    assert snapshot(model) == before
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(123), state[key].nan_to_num(123)), key


@pytest.fixture
def load_hook():
    from peft.tuners.tuners_utils import BaseTuner

    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        pytest.skip("PEFT before 0.21 loads tensor by tensor, with torch's own message")


@pytest.mark.parametrize("config", [PstConfig(), SppConfig()], ids=["pst", "spp"])
def test_checkpoint_whose_shapes_do_not_fit(config, tmp_path, load_hook):
    model = get_peft_model(prune_magnitude(tiny_llama()), config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(k for k in tensors if "down_proj" in k and tensors[k].dim())[-1]
    tensors[key] = torch.randn(*tensors[key].shape, 2)
    save_file(tensors, file)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"(?s)shapes.*{re.escape(str(tuple(tensors[key].shape)))}.*base model"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(tensor, state[k]) for k, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [PstConfig(schedule="constant"), SppConfig()], ids=["pst", "spp"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_checkpoint_of_another_model_leaves_no_trace(config, low_cpu_mem_usage, tmp_path, load_hook):
    """Neither on a plain model nor beside another adapter."""
    wide = tiny_llama()
    wide.model.layers[1].mlp.down_proj = nn.Linear(48, 40, bias=False)
    config.modules_to_save = ["lm_head"]
    get_peft_model(prune_magnitude(wide), config).save_pretrained(tmp_path)
    model = prune_magnitude(tiny_llama())
    before, requires_grad = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="Nothing was loaded"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert snapshot(model) == before and not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == requires_grad

    adapted = get_peft_model(model, type(config)())
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="Nothing was loaded"):
        adapted.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(adapted.peft_config) == ["default"] and adapted.active_adapters == ["default"]
    assert {k: v for k, v in snapshot(adapted).items() if "lm_head" not in k} == {
        k: v for k, v in before.items() if "lm_head" not in k
    }


def test_a_trained_adapter_stays_when_a_checkpoint_does_not_fit(tmp_path, load_hook):
    wide = tiny_llama()
    wide.model.layers[1].mlp.down_proj = nn.Linear(48, 40, bias=False)
    get_peft_model(wide, PstConfig()).save_pretrained(tmp_path / "wide")
    get_peft_model(tiny_llama(), PstConfig()).save_pretrained(tmp_path / "own")
    read = PeftModel.from_pretrained(tiny_llama(), tmp_path / "own", is_trainable=True)
    config = PstConfig.from_pretrained(tmp_path / "own")
    config.inference_mode = False
    made = get_peft_model(tiny_llama(), config)
    made(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1).step()
    for model in (read, made):
        before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="Nothing was loaded"):
            model.load_adapter(tmp_path / "wide", "default")
        assert snapshot(model) == before
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_config_file_with_a_bad_value(tmp_path):
    get_peft_model(tiny_llama(), PstConfig()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"schedule": "cosine"}))
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`schedule` should be one of"):
        PeftModel.from_pretrained(model, tmp_path)
    assert snapshot(model) == before
