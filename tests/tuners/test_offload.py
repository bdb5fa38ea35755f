"""Both tuners on weights that accelerate keeps in CPU memory or on disk, and hooks of the user's on base layers."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM

from peft_sparse import PstConfig, SppConfig, load_sparse, prune_magnitude, save_sparse, sparsity_report
from peft_sparse.linears import block_linears

from models import tiny_gpt2, tiny_llama

IDS = torch.arange(24).view(2, 12) * 3 + 5
CONFIGS = {
    "spp": lambda: SppConfig(r=4, init_weights=False),
    "spp dropout": lambda: SppConfig(r=4, init_weights=False, spp_dropout=0.2),
    "pst": lambda: PstConfig(sparsity=0.5, schedule="constant", initial_warmup=0.0),
}
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def cpu(model, folder):
    return cpu_offload(model, execution_device="cpu")


def disk(model, folder):
    return disk_offload(model, str(folder / "offload"), execution_device="cpu")


def mapped(model, folder):
    """One block here, the rest in other places."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    prefix = "model.layers" if hasattr(model, "model") else "transformer.h"
    names = {f"{prefix}.{i}": "disk" if i else "cpu" for i in range(len(blocks))}
    top = {name: "cpu" for name, _ in model.named_children() if not prefix.startswith(name)}
    inner = prefix.split(".")[0]
    top |= {
        f"{inner}.{name}": "cpu"
        for name, _ in model.get_submodule(inner).named_children()
        if not prefix.endswith(name)
    }
    return dispatch_model(model, names | top, main_device="cpu", offload_dir=str(folder / "map"), force_hooks=True)


def base_of(make):
    return prune_magnitude(make(), pattern="2:4")


def step(model):
    torch.manual_seed(3)
    model.train()
    if hasattr(model.base_model, "set_sparsity_step"):
        model.base_model.set_sparsity_step(10, 10)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def table(model) -> list[str]:
    """A report but for its last line: nothing tells which weights on disk are tied."""
    return str(sparsity_report(model)).splitlines()[:-1]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("offload", [cpu, disk, mapped])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_and_merging_an_offloaded_model(config, offload, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes merged weights of a disk offload into a relative folder
    torch.manual_seed(1)
    here = get_peft_model(base_of(make), config())
    torch.manual_seed(1)
    away = get_peft_model(offload(base_of(make), tmp_path), config())
    weights = {n: p for n, p in away.named_parameters() if n.endswith("base_layer.weight")}
    assert any(p.is_meta for p in weights.values())
    assert not any(p.is_meta for p in away.parameters() if p.requires_grad)
    loss, gradients = step(away)
    expected_loss, expected = step(here)
    assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    for model in (here, away):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.eval()
    with torch.no_grad():
        adapted = here(IDS).logits
        torch.testing.assert_close(away(IDS).logits, adapted, atol=1e-5, rtol=0)
        assert table(away) == table(here)
        merged = away.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, adapted, atol=1e-4, rtol=0)
        assert table(merged) == table(here.merge_and_unload())
    if offload is not mapped:  # transformers saves offloaded models that have a device_map
        remove_hook_from_submodules(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IDS).logits, adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapter_of_an_offloaded_model_is_saved_and_loaded(config, tmp_path):
    away = get_peft_model(cpu(base_of(tiny_llama), tmp_path), config())
    step(away)
    away.eval()
    expected = away(IDS).logits.detach()
    away.save_pretrained(tmp_path / "adapter")
    here = PeftModel.from_pretrained(base_of(tiny_llama), tmp_path / "adapter")
    torch.testing.assert_close(here(IDS).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(
    not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"),
    reason="PEFT before 0.21 looks for modules of a disk offload under the names of the base model (KeyError)",
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loading_an_adapter_dispatches_the_model_anew(config, tmp_path, monkeypatch):
    """What PEFT does for a model with a device_map; factors that it offloads come back to be trained."""
    monkeypatch.chdir(tmp_path)  # PEFT writes adapters of a disk offload into a relative folder
    saved = saved_adapter(config, tmp_path)
    base = partly_on_disk(tmp_path)
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", is_trainable=True, offload_folder=str(tmp_path / "off2"),
        device_map={f"base_model.model.{name}": where for name, where in base.hf_device_map.items()},
    )  # fmt: skip
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, saved.eval()(IDS).logits, atol=1e-5, rtol=0)
    _, gradients = step(model)
    assert len(gradients) >= 28 and all(gradient is not None for gradient in gradients.values())
    assert table(model) == table(saved)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_passes_over_modules_on_disk(config, tmp_path):
    """It would leave their factors as they were drawn."""
    saved_adapter(config, tmp_path)
    for base in (partly_on_disk(tmp_path), cpu(base_of(tiny_llama), tmp_path)):
        with pytest.raises(ValueError, match=r"wholly in memory, got one with the weights of `model\.\S+` kept else"):
            base.load_adapter(str(tmp_path / "adapter"))
        assert not any("lora" in name or "pst_" in name or "spp_" in name for name, _ in base.named_parameters())
    here = base_of(tiny_llama)
    here.load_adapter(str(tmp_path / "adapter"))
    assert any(name.endswith(".default") for name, _ in here.named_parameters())


def saved_adapter(config, folder):
    """A model with a trained adapter, which is saved, and its base, beside it."""
    base_of(tiny_llama).save_pretrained(folder / "base")
    model = get_peft_model(base_of(tiny_llama), config())
    step(model)
    model.save_pretrained(folder / "adapter")
    return model


def partly_on_disk(folder):
    blocks = {f"model.layers.{i}": "disk" for i in range(2)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", offload_folder=str(folder / "off"), device_map=blocks | rest
    )


def test_offloaded_factors_are_read_but_not_trained(tmp_path):
    model = get_peft_model(base_of(tiny_llama), CONFIGS["spp"]())
    expected = model(IDS).logits.detach()
    cpu(model, tmp_path)
    assert all(p.is_meta for n, p in model.named_parameters() if "spp_A" in n)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"gradients would be lost.*keep_adapters_loaded\(\)"):
        model(IDS)
    model.base_model.keep_adapters_loaded()
    _, gradients = step(model)
    assert len(gradients) == 28 and all(gradient is not None for gradient in gradients.values())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_hooks_on_base_layers_fire(config):
    model = get_peft_model(base_of(tiny_llama), config())
    seen = {"forward": 0, "pre": 0, "backward": 0}

    def count(key):
        def hook(*_):
            seen[key] += 1

        return hook

    for linear in block_linears(model.get_base_model()).values():
        linear.base_layer.register_forward_hook(count("forward"))
        linear.base_layer.register_forward_pre_hook(count("pre"))
        linear.base_layer.register_full_backward_hook(count("backward"))
    plain = get_peft_model(base_of(tiny_llama), config())
    plain.load_state_dict(model.state_dict())
    loss, gradients = step(model)
    expected_loss, expected = step(plain)
    assert seen == {"forward": 14, "pre": 14, "backward": 14} and torch.equal(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_hook_may_change_what_a_base_layer_gives():
    model = get_peft_model(base_of(tiny_llama), SppConfig())
    expected = model(IDS).logits.detach()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.allclose(model(IDS).logits, expected)
    handle.remove()
    assert torch.equal(model(IDS).logits, expected)


def test_packed_checkpoint_of_a_merged_offloaded_model(tmp_path):
    away = get_peft_model(cpu(base_of(tiny_llama), tmp_path), CONFIGS["spp"]()).eval()
    expected = away(IDS).logits.detach()
    merged = away.merge_and_unload()
    save_sparse(merged, tmp_path / "packed")
    torch.testing.assert_close(load_sparse(tmp_path / "packed")(IDS).logits, expected, atol=1e-4, rtol=0)
