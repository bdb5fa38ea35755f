"""PEFT's contract, once for every method and kind of linear: one row here buys all of these checks.

PEFT's own suite (test_peft_suite.py) covers much of it on its models; here are the transformers APIs, the pattern of
zeros, exactness, half precision and several adapters.
"""

import copy
import sys
import warnings
from types import MethodType

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from renamed import mixtral
from torch import nn
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.architectures import ARCHITECTURES
from peft_sparse import PstConfig, SppConfig, load_sparse, ops, save_sparse
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude
from peft_sparse.tuners.sparse_layer import SparseLayer

from models import tiny_bert, tiny_gpt2, tiny_llama

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
CONFIGS = {
    "pst": lambda **kw: PstConfig(schedule="constant", sparsity=0.5, init_weights=False, **kw),
    "pst 2:4": lambda **kw: PstConfig(schedule="constant", pattern="2:4", init_weights=False, **kw),
    "movement": lambda **kw: PstConfig(
        schedule="constant", sparsity=0.5, importance="movement", weight_update="full", init_weights=False, **kw
    ),
    "magnitude": lambda **kw: PstConfig(
        schedule="constant", sparsity=0.5, importance="magnitude", init_weights=False, **kw
    ),
    "scores only": lambda **kw: PstConfig(
        schedule="constant", sparsity=0.5, weight_update="none", init_weights=False, **kw
    ),
    "spp": lambda **kw: SppConfig(r=5, init_weights=False, **kw),
    "spp, dropout": lambda **kw: SppConfig(r=5, spp_dropout=0.3, init_weights=False, **kw),
}
pytestmark = pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")

each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tokens() -> dict:
    return {"input_ids": torch.arange(3, 33).reshape(2, 15)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    training = model.training
    model.eval()
    found = model(**tokens()).logits
    model.train(training)
    return found


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def pruned_model(build, config) -> nn.Module:
    """SPP wants a pruned base, PST a dense one."""
    model = build()
    if isinstance(config(), SppConfig):
        prune_magnitude(model, sparsity=0.5)
    return model


@each_model
@each_config
def test_merge_gives_the_same_function_and_zeros(build, config):
    model = get_peft_model(pruned_model(build, config), config())
    before = logits(model)
    expected = {
        name: layer.merged_weight(["default"]) for name, layer in sparse_layers(model.base_model.model).items()
    }
    merged = model.merge_and_unload()
    assert not sparse_layers(merged) and type(merged) is type(build())
    assert (logits(merged) - before).abs().max() <= 1e-4 * before.abs().max()
    for name, module in block_linears(merged).items():
        assert torch.equal(get_weight(module), expected[name])
        zeros = (get_weight(module) == 0).sum().item()
        assert zeros == get_weight(module).numel() // 2, name


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_the_forward_s_to_the_last_bit(config, dtype):
    """An identity matrix as the input reads the weight out of a forward."""
    model = (
        get_peft_model(nn.Sequential(nn.Linear(300, 200, bias=False)), config(target_modules=["0"])).to(dtype).eval()
    )
    with torch.no_grad():
        used = model(torch.eye(300, dtype=dtype)).T
    assert torch.equal(model.merge_and_unload()[0].weight, used)


@each_model
@each_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge(build, config, dtype):
    base = pruned_model(build, config).to(dtype)
    zeros = {name: get_weight(module) == 0 for name, module in block_linears(base).items()}
    model = get_peft_model(base, config())
    before = logits(model).float()
    merged = model.merge_and_unload()
    assert (logits(merged).float() - before).abs().max() <= 2e-2 * before.abs().max()
    for name, module in block_linears(merged).items():
        assert get_weight(module).dtype == dtype
        assert (get_weight(module) == 0).sum() == get_weight(module).numel() // 2, name
        if isinstance(config(), SppConfig):
            assert torch.equal(get_weight(module) == 0, zeros[name])


@each_config
@each_model
def test_a_base_made_in_inference_mode_is_merged_and_unmerged(build, config):
    with torch.inference_mode():
        base = pruned_model(build, config)
    model = get_peft_model(base, config()).eval()
    before, weights = logits(model), [module.weight.clone() for module in block_linears(base).values()]
    for inference in (False, True):
        with torch.inference_mode(inference):
            model.merge_adapter()
            assert (logits(model) - before).abs().max() <= 1e-4 * before.abs().max()
            model.unmerge_adapter()
            assert all(map(torch.equal, weights, (module.weight for module in block_linears(base).values())))


@each_model
@each_config
def test_unmerge_restores_every_bit(build, config):
    base = pruned_model(build, config)
    weights = {name: module.weight.detach().clone() for name, module in block_linears(base).items()}
    model = get_peft_model(base, config())
    before = logits(model)
    model.merge_adapter()
    assert not torch.equal(next(iter(sparse_layers(model).values())).weight, next(iter(weights.values())))
    model.unmerge_adapter()
    for name, layer in sparse_layers(model.base_model.model).items():
        assert torch.equal(layer.weight, weights[name])
    assert torch.equal(logits(model), before)


@each_config
def test_disable_and_unload_give_the_base_model(config):
    base = pruned_model(tiny_llama, config)
    before = logits(base)
    model = get_peft_model(base, config())
    adapted = logits(model)
    assert not torch.allclose(adapted, before)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(model.unload()), before)


@each_config
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(config, low_cpu_mem_usage, tmp_path):
    base = pruned_model(tiny_llama, config)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, config())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(loaded).values(), strict=True):
        assert torch.equal(layer.merged_weight(["default"]), other.merged_weight(["default"]))
        if hasattr(other, "pst_pruned"):
            assert other.pst_pruned["default"].dtype == torch.int64


@each_config
@pytest.mark.parametrize("how", ["as ever", "low_cpu_mem_usage", "native"])
def test_factors_are_not_rounded_when_a_half_precision_base_gets_them(config, how, tmp_path):
    """They are float32 there, and rounded ones would select another mask."""
    base = pruned_model(tiny_llama, config).to(torch.bfloat16)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, config())
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter)  # as training would, with float32's digits
    model.save_pretrained(tmp_path)
    if how == "native":
        fresh.load_adapter(str(tmp_path), adapter_name="default")
    else:
        fresh = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=how == "low_cpu_mem_usage")
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(fresh).values(), strict=True):
        for kind in layer.adapter_layer_names:
            for factor, found in zip(getattr(layer, kind).values(), getattr(other, kind).values(), strict=True):
                assert found.dtype == torch.float32 and torch.equal(found, factor)
        assert torch.equal(layer.merged_weight(["default"]), other.merged_weight(["default"]))


@each_config
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_factors_in_the_dtype_of_the_base(config, low_cpu_mem_usage, tmp_path):
    """As LoRA's, if that is asked for; double precision needs not be asked for."""
    base = pruned_model(tiny_llama, config)
    get_peft_model(copy.deepcopy(base), config()).save_pretrained(tmp_path)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float64, False), (torch.float64, True)):
        arguments = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast}
        loaded = PeftModel.from_pretrained(copy.deepcopy(base).to(dtype), tmp_path, is_trainable=True, **arguments)
        loaded.add_adapter("b", config(), autocast_adapter_dtype=autocast)
        factors = {name: p for name, p in loaded.named_parameters() if "pst_" in name or "spp_" in name}
        assert factors and {p.dtype for p in factors.values()} == {dtype}
        assert all(p.requires_grad == name.endswith("default") for name, p in factors.items())


@each_config
def test_all_of_it_in_inference_mode(config, tmp_path):
    """Tensors that are made there have no version counter."""
    base = pruned_model(tiny_llama, config)
    with torch.inference_mode():
        model = get_peft_model(copy.deepcopy(base), config())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        expected = logits(model)
        assert torch.equal(logits(loaded), expected)
        assert torch.allclose(logits(loaded.merge_and_unload()), expected, atol=1e-5)


@each_config
def test_auto_class(config, tmp_path):
    pruned_model(tiny_llama, config).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


@each_config
@pytest.mark.usefixtures("transformers_adapters")
def test_transformers_own_api(config, tmp_path):
    base = pruned_model(tiny_llama, config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)

    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"), adapter_name="a")
    assert torch.equal(logits(native), expected)
    native.add_adapter(config(), adapter_name="b")
    native.set_adapter("b")
    assert not torch.equal(logits(native), expected)
    native.delete_adapter("b")
    native.set_adapter("a")
    assert torch.equal(logits(native), expected)
    native.disable_adapters()
    assert torch.equal(logits(native), logits(base))


@each_config
def test_inject_and_state_dict(config):
    base = pruned_model(tiny_gpt2, config)
    other = copy.deepcopy(base)
    model = inject_adapter_in_model(config(), base)
    again = inject_adapter_in_model(config(), other)
    assert not torch.equal(logits(model), logits(again))
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(model), logits(again))


@each_config
@each_model
def test_several_adapters_compose_and_merge_in_order(build, config):
    model = get_peft_model(pruned_model(build, config), config(), adapter_name="a")
    model.add_adapter("b", config())
    single = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        single[name] = logits(model)
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    assert not torch.allclose(both, single["a"]) and not torch.allclose(both, single["b"])
    layer = next(iter(sparse_layers(model).values()))
    with torch.no_grad():
        composed = layer.effective_weight("b", layer.effective_weight("a"))
    torch.testing.assert_close(layer.merged_weight(["a", "b"]), composed)

    one_by_one = copy.deepcopy(model)
    one_by_one.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging"):
        one_by_one.merge_adapter(["b"])
    merged = model.merge_and_unload()
    for found in (logits(merged), logits(one_by_one)):
        assert (found - both).abs().max() <= 1e-4 * both.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [PstConfig, SppConfig])
def test_composed_adapters_keep_the_zeros_of_the_forward_in_half_precision(make, dtype):
    """The second adapter sees the first one's weight before it is rounded, and PST selects from what it sees."""
    dense = nn.Sequential(nn.Linear(128, 256, bias=False)).to(dtype)
    base = prune_magnitude(dense, sparsity=0.2, target_modules=["0"])
    shares = [{"sparsity": share, "schedule": "constant"} if make is PstConfig else {} for share in (0.5, 0.7)]
    model = get_peft_model(base, make(target_modules=["0"], init_weights=False, **shares[0]), adapter_name="a")
    model.add_adapter("b", make(target_modules=["0"], init_weights=False, **shares[1]))
    layer = base[0]
    with torch.no_grad():
        for parameter in layer.adapter_containers()[0].parameters():
            parameter.mul_(0.02)
        composed = layer.effective_weight("b", layer.effective_weight("a"))
    merged = layer.merged_weight(["a", "b"])
    assert merged.dtype == dtype and torch.equal(merged != 0, composed != 0)
    torch.testing.assert_close(merged, composed.to(dtype), rtol=0, atol=1e-7)  # none became a zero by rounding


@each_config
def test_an_adapter_without_memory_on_a_base_that_has_some(config, tmp_path):
    saved = get_peft_model(pruned_model(tiny_llama, config), config())
    saved.save_pretrained(tmp_path)
    model = pruned_model(tiny_llama, config)
    with torch.device("meta"):
        model = get_peft_model(model, config())
    set_peft_model_state_dict(model, get_peft_model_state_dict(saved), low_cpu_mem_usage=True)
    assert torch.equal(logits(model.eval()), logits(saved.eval()))


@each_config
def test_a_weighted_sum_of_adapters_is_refused(config):
    model = get_peft_model(pruned_model(tiny_llama, config), config())
    with pytest.raises(TypeError, match="no weighted sum"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@each_config
def test_composed_adapters_get_gradients(config):
    model = get_peft_model(pruned_model(tiny_llama, config), config(), adapter_name="a")
    model.add_adapter("b", config())
    model.base_model.set_adapter(["a", "b"])
    model.train()
    model(**tokens()).logits.square().sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trainable} == {"a", "b"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@each_config
def test_all_linear_exclude_and_modules_to_save(config):
    model = get_peft_model(
        pruned_model(tiny_bert, config),
        config(target_modules="all-linear", exclude_modules=["pooler.dense"], modules_to_save=["classifier"]),
    )
    names = set(sparse_layers(model.base_model.model))
    assert names == set(block_linears(tiny_bert()))
    assert all(p.requires_grad for n, p in model.named_parameters() if "classifier.modules_to_save" in n)


@each_model
@each_config
def test_starts_at_the_identity(build, config):
    """At the default start SPP is the base model; PST, at its initial sparsity of 0, too."""
    model = pruned_model(build, config)
    before = logits(model)
    fresh = config()
    started = type(fresh)(**{k: v for k, v in fresh.to_dict().items() if k not in ("init_weights", "schedule")})
    torch.testing.assert_close(logits(get_peft_model(model, started)), before)


def test_default_targets_are_the_linears_of_the_blocks():
    for build in MODELS.values():
        model = build()
        expected = set(block_linears(model))
        names = set(sparse_layers(get_peft_model(model, PstConfig()).base_model.model))
        assert names == expected and not any(word in n for n in names for word in ("pooler", "head", "embed", "wte"))


@each_config
def test_default_targets_have_a_weight_of_their_own(config):
    """Two linears with one Parameter would be merged one on top of the other."""
    model = pruned_model(tiny_llama, config)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.warns(UserWarning, match=r"2 of 14 get no adapter .*layers.0.mlp.up_proj.*layers.1.mlp.up_proj"):
        model = get_peft_model(model, config())
    adapted = sparse_layers(model.base_model.model)
    assert len(adapted) == 12 and not any(name.endswith("up_proj") for name in adapted)
    before = logits(model)
    assert (logits(model.merge_and_unload()) - before).abs().max() <= 1e-4 * before.abs().max()


def test_one_module_in_several_places_gets_one_adapter():
    """As the blocks of ALBERT."""
    model = prune_magnitude(tiny_llama())
    model.model.layers[1] = model.model.layers[0]
    model = get_peft_model(model, SppConfig(init_weights=False))
    assert len(sparse_layers(model)) == 7
    before = logits(model)
    assert (logits(model.merge_and_unload()) - before).abs().max() <= 1e-4 * before.abs().max()


def test_pst_tells_what_stays_dense():
    """As the pruners do: its sparsity is that of the adapted weights alone."""
    named = r"4 parameters .* stay dense, \d+% of the model, such as `model.layers.0.mlp.experts.gate_up_proj`"
    with pytest.warns(UserWarning, match=named):
        model = get_peft_model(mixtral(), PstConfig(sparsity=0.5))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stay dense")
        get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
        get_peft_model(mixtral(), PstConfig(target_modules=["q_proj"]))  # whoever names some means some
        inject_adapter_in_model(model.peft_config["default"], mixtral())  # as from an adapter's file


def test_layers_to_transform_with_default_targets():
    model = get_peft_model(tiny_bert(), PstConfig(layers_to_transform=[1]))
    names = sparse_layers(model.base_model.model)
    assert names and all(".layer.1." in name for name in names)


def test_layers_to_transform_where_default_targets_are_full_names():
    """Of SigLIP, whose pooler has an MLP as the blocks have."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
    for layers, expected in (([1], {"1"}), (0, {"0"}), (None, {"0", "1"})):
        model = get_peft_model(SiglipVisionModel(vision), PstConfig(layers_to_transform=layers))
        names = sparse_layers(model.base_model.model)
        assert len(names) == 6 * len(expected) and {name.split(".")[-3] for name in names} == expected
    with pytest.raises(ValueError, match=r"indices of blocks that hold default targets, got \[7\]"):
        get_peft_model(SiglipVisionModel(vision), PstConfig(layers_to_transform=[7]))


@each_config
def test_gradient_checkpointing(config):
    losses, grads = [], []
    for use_reentrant in (None, True, False):
        torch.manual_seed(0)
        model = get_peft_model(pruned_model(tiny_llama, config), config())
        model.train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(losses[1:], losses[:1] * 2)
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


@each_config
def test_shapes_on_the_meta_device(config):
    """As LoRA: to tell shapes, memory or operations of a model that is never loaded. (Not of a Llama: the rotary
    embeddings of transformers 5.0 ask torch for the autocast of that device, which it does not know.)"""
    with torch.device("meta"):
        base = tiny_bert()
    model = get_peft_model(base, config(), low_cpu_mem_usage=True)
    model.add_adapter("other", config(), low_cpu_mem_usage=True)
    for active in ("default", ["default", "other"]):
        model.base_model.set_adapter(active)
        ids = tokens()["input_ids"].to("meta")
        output = model(input_ids=ids, labels=torch.zeros(2, dtype=torch.int64, device="meta"))
        output.loss.backward()
        assert output.logits.is_meta and output.logits.shape == (2, 2)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.grad.shape == p.shape for p in trained)


@each_config
def test_the_reference_can_be_put_to_work(config, monkeypatch):
    """Same loss and gradients; and the fused functions are not called."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(pruned_model(tiny_gpt2, config), config())
        if enabled:
            for function in (ops.spp_linear, ops.pst_linear):
                module = sys.modules[function.__module__]
                for fused in ("_SppLinear", "_PstLinear"):
                    monkeypatch.setattr(module, fused, None, raising=False)
        with ops.use_reference(enabled):
            torch.manual_seed(1)
            loss = model(**tokens(), labels=tokens()["input_ids"]).loss
            loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert not ops.reference.reference_in_use()


def test_default_targets_leave_out_linears_that_are_not_called():
    with pytest.warns(
        UserWarning, match=r"so 8 of 14 get no adapter: `wavlm\.encoder\.layers\.\*\.attention\.k_proj`"
    ):
        model = get_peft_model(ARCHITECTURES["WavLM"].build(), PstConfig())
    names = {name.split(".")[-1] for name in sparse_layers(model)}
    assert names == {"gru_rel_pos_linear", "intermediate_dense", "output_dense"}
    with pytest.raises(ValueError, match=r"got `.*k_proj`, whose weight WavLMAttention takes without calling it"):
        get_peft_model(ARCHITECTURES["WavLM"].build(), PstConfig(target_modules=["k_proj"]))


@each_config
def test_a_linear_whose_forward_was_replaced_is_not_adapted(config):
    def doubled(self, x):
        return 2 * nn.functional.linear(x, self.weight, self.bias)

    model = pruned_model(tiny_llama, config)
    linear = model.model.layers[0].self_attn.q_proj
    linear.forward = MethodType(doubled, linear)
    with pytest.raises(ValueError, match=r"got `.*layers\.0\..*q_proj`, whose `forward` was replaced by <bound"):
        get_peft_model(model, config(target_modules=["q_proj"]))
    parallel = pruned_model(tiny_llama, config)

    def tp_forward(x):
        return x

    tp_forward.__module__ = "transformers.distributed.tensor_parallel"
    parallel.model.layers[0].self_attn.q_proj.forward = tp_forward
    with pytest.raises(ValueError, match=r"; load the model without `tp_plan`, and train .* with FSDP\."):
        get_peft_model(parallel, config(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"`model.layers.\*.self_attn.q_proj` get no adapter: their `forward` was"):
        adapted = get_peft_model(model, config())
    assert len(sparse_layers(adapted)) == 13 and linear in adapted.modules()
    hooked = pruned_model(tiny_llama, config)
    for name in ("q_proj", "k_proj"):  # accelerate's forward calls the linear's own, and leaves that behind
        add_hook_to_module(getattr(hooked.model.layers[0].self_attn, name), ModelHook())
    remove_hook_from_module(hooked.model.layers[0].self_attn.k_proj)
    assert len(sparse_layers(get_peft_model(hooked, config()))) == 14


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5TextConfig"), reason="this transformers has no Qwen3.5")
def test_default_targets_of_gated_delta_nets_are_all_linears():
    model = ARCHITECTURES["Qwen3.5"].build()
    expected = set(block_linears(model))
    assert set(sparse_layers(get_peft_model(model, PstConfig()).base_model.model)) == expected
    assert {f"model.layers.0.linear_attn.{n}" for n in ("in_proj_qkv", "in_proj_z", "out_proj")} <= expected


class Hidden(nn.Module):
    """Computes with a weight in a way that its code does not show."""

    def __init__(self):
        super().__init__()
        self.called, self.taken = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), getattr(self, "tak" + "en").weight)


@pytest.mark.parametrize("trained", [False, True])
def test_pst_warns_of_a_merge_that_prunes_what_never_learned(trained):
    """Not before training, when no layer has learned."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(Hidden()),
        PstConfig(schedule="constant", sparsity=0.5, target_modules=["called", "taken"]),
    )
    if trained:
        model(torch.ones(2, 8)).sum().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_and_unload()
    messages = [str(warning.message) for warning in caught if "learned nothing" in str(warning.message)]
    assert len(messages) == trained and all("got `0.taken` (1 in all)" in message for message in messages)


@each_config
def test_a_head_tied_to_the_decoder_stays_tied(config, tmp_path):
    """PEFT compares it with the input embeddings, which are the encoder's."""
    architecture = ARCHITECTURES["T5Gemma"]
    model = get_peft_model(pruned_model(architecture.build, config), config())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tied")
        merged = model.merge_and_unload().eval()
    assert merged.config.tie_word_embeddings
    assert merged.get_output_embeddings().weight is merged.get_decoder().embed_tokens.weight
    merged.save_pretrained(tmp_path / "dense")
    save_sparse(merged, tmp_path / "packed")
    for again in (type(merged).from_pretrained(tmp_path / "dense"), load_sparse(tmp_path / "packed")):
        with torch.no_grad():
            found, expected = (m(**architecture.batch()).logits for m in (again.eval(), merged))
        assert torch.equal(found, expected)


def test_a_head_that_training_untied_is_said_to_be():
    model = get_peft_model(tiny_gpt2(), PstConfig(schedule="constant", sparsity=0.5, modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="A head is tied to the embeddings while they share a weight, got two"):
        assert not model.merge_and_unload().config.tie_word_embeddings


@each_config
def test_a_model_whose_head_training_untied_is_saved_whole(config, tmp_path):
    """BART's config ties the encoder's and the decoder's embeddings as well, which then have weights of their own."""
    architecture = ARCHITECTURES["BART"]
    model = get_peft_model(pruned_model(architecture.build, config), config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()
        expected = model.eval()(**architecture.batch()).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "dense")
    save_sparse(merged, tmp_path / "packed")
    for again in (merged, type(merged).from_pretrained(tmp_path / "dense"), load_sparse(tmp_path / "packed")):
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(**architecture.batch()).logits, expected)
