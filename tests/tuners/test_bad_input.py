"""Bad input that needs more than a row of tests/test_bad_input.py: what stays when something is refused half-way."""

import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sparse import PstConfig, SppConfig
from peft_sparse.pruning import prune_magnitude

from models import tiny_llama


class Odd(nn.Module):
    """Blocks whose second linear has a width that 4 does not divide."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(2))


def snapshot(model: nn.Module) -> dict:
    return {name: (type(module), *(id(p) for p in module.parameters())) for name, module in model.named_modules()}


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
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    del settings["checksums"]  # which would be the first to say that the file was changed
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
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


def test_a_new_adapter_that_was_made_of_a_saved_config_stays_when_other_weights_do_not_fit(tmp_path, load_hook):
    wide = tiny_llama()
    wide.model.layers[1].mlp.down_proj = nn.Linear(48, 40, bias=False)
    get_peft_model(wide, PstConfig()).save_pretrained(tmp_path / "wide")
    get_peft_model(tiny_llama(), PstConfig()).save_pretrained(tmp_path / "own")
    model = get_peft_model(tiny_llama(), PstConfig.from_pretrained(tmp_path / "own"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="Nothing was loaded"):
        model.load_adapter(tmp_path / "wide", "default")
    assert snapshot(model) == before


@pytest.mark.parametrize("folder", ["wide", "other settings"])
def test_a_config_of_the_caller_s_that_does_not_fit_leaves_no_trace(folder, tmp_path, load_hook):
    """PEFT wraps the base before it looks at the weights."""
    wide = tiny_llama()
    wide.model.layers[1].mlp.down_proj = nn.Linear(48, 40, bias=False)
    get_peft_model(wide, PstConfig(sparsity=0.5)).save_pretrained(tmp_path / "wide")
    get_peft_model(tiny_llama(), PstConfig(sparsity=0.5, beta=0.5)).save_pretrained(tmp_path / "other settings")
    get_peft_model(tiny_llama(), PstConfig(sparsity=0.5)).save_pretrained(tmp_path / "own")
    model, config = tiny_llama(), PstConfig(sparsity=0.5)
    before, requires_grad = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="Nothing was loaded"):
        PeftModel.from_pretrained(model, tmp_path / folder, "default", False, config)
    assert snapshot(model) == before and [p.requires_grad for p in model.parameters()] == requires_grad
    assert not config.awaits_weights
    loaded = PeftModel.from_pretrained(model, tmp_path / "own", config=config)
    assert type(loaded).__name__ == "PeftModel" and not config.awaits_weights


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
