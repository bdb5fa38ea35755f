"""An adapter is added wholly or not at all: after a refusal the model is as it was, and goes on working."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn

from peft_sparse import PstConfig, SppConfig, prune_magnitude
from peft_sparse.tuners.pst import PstLinear
from peft_sparse.tuners.spp import SppLinear

from models import tiny_llama

CONFIGS = {"pst": (PstConfig, PstLinear), "spp": (SppConfig, SppLinear)}
each_method = pytest.mark.parametrize("config, layer", CONFIGS.values(), ids=CONFIGS)


def plain(config) -> nn.Module:
    return prune_magnitude(tiny_llama())


def adapted(config) -> nn.Module:
    """With a trained adapter on some layers, and a frozen one."""
    model = get_peft_model(plain(config), config(init_weights=False, target_modules=["q_proj"]))
    model.add_adapter("frozen", config(target_modules=["q_proj", "k_proj"], modules_to_save=["norm"]))
    return model


each_start = pytest.mark.parametrize("start", [plain, adapted])


def add(model: nn.Module, name: str, config) -> None:
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
    else:
        get_peft_model(model, config, adapter_name=name)


def state(model: nn.Module) -> dict:
    """All modules, and all tensors with whether they are trained."""
    tensors = model.state_dict(keep_vars=True)
    return {name: type(module) for name, module in model.named_modules()} | {
        name: (tensor.tolist(), tensor.requires_grad) for name, tensor in tensors.items()
    }


def refuses(model: nn.Module, name: str, config, error: type[Exception], words: str) -> None:
    before = state(model)
    with pytest.raises(error, match=words):
        add(model, name, config)
    assert state(model) == before
    if hasattr(model, "peft_config"):
        assert list(model.peft_config) == ["default", "frozen"] and model.active_adapters == ["default"]
        model.set_adapter("frozen")
        model.get_model_status()
        with model.disable_adapter():
            model(input_ids=torch.arange(4)[None])
        model.delete_adapter("frozen")
    add(model, "good", type(config)())


@each_method
@each_start
@pytest.mark.parametrize("name", ["v1.0", "train", "keys", "_apply", "training", ""])
def test_names_that_no_parameter_can_have(config, layer, start, name):
    words = rf"not empty, without a dot, and no attribute .* got '{name}'; take another"
    refuses(start(config), name, config(), ValueError, words)


def test_names_of_what_the_counts_know():
    refuses(adapted(PstConfig), "withheld", PstConfig(), ValueError, "got 'withheld'; take another")


@each_method
@each_start
@pytest.mark.parametrize("place", [0, 3, 13])
def test_a_failure_half_way(config, layer, start, place, monkeypatch):
    update_layer, done = layer.update_layer, []

    def fails(self, *args, **kwargs):
        done.append(update_layer(self, *args, **kwargs))
        if len(done) == place + 1:
            raise MemoryError("no room for a factor")

    model = start(config)
    monkeypatch.setattr(layer, "update_layer", fails)
    refuses(model, "other", config(), MemoryError, "no room")


@each_method
@each_start
def test_a_module_that_cannot_be_trained_whole(config, layer, start):
    """PEFT finds that out when all layers have got their adapters."""
    model = start(config)
    (model if start is plain else model.base_model.model).more = nn.ModuleList([nn.Linear(2, 2)])
    refuses(
        model, "other", config(modules_to_save=["norm", "more"]), TypeError, "cannot be applied to modules of type"
    )


# One linear in several places


class Shared(nn.Module):
    """Two blocks that have a linear in common, and a list that holds one three times."""

    def __init__(self) -> None:
        super().__init__()
        common, repeated = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": common, "own": nn.Linear(8, 8)}) for _ in range(2))
        self.heads = nn.ModuleList([repeated] * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*(layer[name] for layer in self.layers for name in ("fc", "own")), *self.heads):
            x = layer(x).tanh()
        return x


@each_method
@pytest.mark.filterwarnings("ignore:SPP tunes a model that is already pruned")
def test_a_linear_in_several_places_is_adapted_in_all_of_them(config, layer, tmp_path):
    def shared() -> nn.Module:
        torch.manual_seed(0)
        return Shared()

    settings = {"schedule": "constant", "sparsity": 0.5} if config is PstConfig else {}
    base, x = shared(), torch.randn(3, 8)
    model = get_peft_model(base, config(target_modules=["fc", "heads.0"], init_weights=False, **settings))
    assert isinstance(base.layers[0]["fc"], layer) and base.layers[1]["fc"] is base.layers[0]["fc"]
    assert isinstance(base.heads[0], layer) and len(set(base.heads)) == 1
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(shared(), tmp_path)(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert {type(module) for module in merged.modules()} == {type(module) for module in shared().modules()}
    assert merged.layers[1]["fc"] is merged.layers[0]["fc"] and len(set(merged.heads)) == 1


@each_method
def test_a_linear_in_several_places_is_itself_again_if_it_cannot_be_adapted(config, layer, monkeypatch):
    base = Shared()
    before, update_layer = dict(base.named_modules(remove_duplicate=False)), layer.update_layer

    def fails(self, *args, **kwargs):
        if self.module_name == "heads.0":
            raise MemoryError("no room for a factor")
        update_layer(self, *args, **kwargs)

    monkeypatch.setattr(layer, "update_layer", fails)
    with pytest.raises(MemoryError, match="no room"):
        get_peft_model(base, config(target_modules=["fc", "heads.0"]))
    assert dict(base.named_modules(remove_duplicate=False)) == before


# A second adapter of the same name, as when the cell of a notebook runs again


def trained(config, **settings) -> tuple[nn.Module, nn.Module]:
    """A base model, and that with an adapter and a head that are trained."""
    base = prune_magnitude(tiny_llama())
    return base, get_peft_model(base, config(init_weights=False, modules_to_save=["lm_head"], **settings))


@each_method
@pytest.mark.parametrize(
    "bad, error", [({"target_modules": ["nope"]}, ValueError), ({"modules_to_save": ["more"]}, TypeError)]
)
def test_an_adapter_stays_if_a_second_one_of_its_name_cannot_be_added(config, layer, bad, error):
    base, model = trained(config, target_modules=["q_proj", "k_proj"])
    model.add_adapter("other", config())
    base.more = nn.ModuleList([nn.Linear(2, 2)])
    model.set_adapter("other")
    before, configs = state(model), dict(model.peft_config)
    with pytest.warns(UserWarning, match="for a second time"), pytest.raises(error):
        get_peft_model(base, config(**bad))
    assert state(model) == before and model.peft_config == configs
    assert model.base_model.sparse_layers()[0].active_adapters == ["other"]
    model.set_adapter("default")
    model.merge_and_unload()


@pytest.mark.parametrize("place", [0, 1])
@each_method
def test_an_adapter_stays_if_a_second_one_fails_half_way(config, layer, place, monkeypatch):
    base, model = trained(config, target_modules=["q_proj"])
    before, update_layer, done = state(model), layer.update_layer, []

    def fails(self, *args, **kwargs):
        done.append(update_layer(self, *args, **kwargs))
        if len(done) == place + 1:
            raise MemoryError("no room for a factor")

    monkeypatch.setattr(layer, "update_layer", fails)
    with pytest.raises(MemoryError, match="no room"):
        get_peft_model(base, config(r=2))
    assert state(model) == before


@pytest.mark.parametrize(
    "config, settings, parameters",
    [
        (PstConfig, {"importance": "magnitude"}, ["pst_U", "pst_V"]),
        (PstConfig, {"weight_update": "full", "importance": "movement"}, ["pst_D", "pst_S"]),
        (PstConfig, {"weight_update": "none", "importance": "movement"}, ["pst_S"]),
        (SppConfig, {"r": 2}, ["spp_A", "spp_B"]),
    ],
    ids=str,
)
def test_nothing_is_left_of_an_adapter_whose_name_is_given_anew(config, settings, parameters):
    base, _ = trained(config, target_modules=["q_proj", "k_proj"])
    again = get_peft_model(base, config(target_modules=["q_proj"], **settings))
    torch.manual_seed(1)
    fresh = get_peft_model(prune_magnitude(tiny_llama()), config(target_modules=["q_proj"], **settings))
    names = {name for name, parameter in again.named_parameters() if parameter.requires_grad and "_head" not in name}
    assert names == {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert sorted({name.split(".")[-2] for name in names}) == parameters
    ids = torch.arange(4)[None]
    assert torch.equal(again(input_ids=ids).logits, fresh(input_ids=ids).logits)


@each_method
def test_the_name_of_a_merged_adapter_is_not_given_anew(config, layer):
    base, model = trained(config)
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ValueError, match="A new adapter takes the place of adapters that are not merged"):
        get_peft_model(base, config())
    assert state(model) == before


# What else is asked of a config, and of PEFT's helpers


@each_method
def test_an_adapter_with_the_config_of_a_trained_one_is_told_to_be_no_copy(config, layer, recwarn):
    """TRL makes its reference so: `model.add_adapter("ref", model.peft_config["default"])`."""
    model = get_peft_model(prune_magnitude(tiny_llama()), config())
    model.add_adapter("beside", model.peft_config["default"])
    assert not [warning for warning in recwarn if "no copy" in str(warning.message)]  # both are new
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    with pytest.warns(UserWarning, match=r"got 'ref' with the config of 'default', .*`peft_config`, or a `ref_model`"):
        model.add_adapter("ref", model.peft_config["default"])
    recwarn.clear()
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    assert not [warning for warning in recwarn if "no copy" in str(warning.message)]


@each_start
@pytest.mark.parametrize(
    "config, field, value, words",
    [
        (PstConfig, "pattern", "2:4", "fixes the sparsity at 0.5, got sparsity=0.9"),
        (PstConfig, "sparsity", 50, r"lies in \[0, 1\), got 50"),
        (PstConfig, "score_r", 0, "`score_r` should be a positive integer, got 0"),
        (SppConfig, "r", 0, "`r` should be a positive integer, got 0"),
        (SppConfig, "spp_dropout", 1.5, r"a probability in \[0, 1\), got 1.5"),
        (SppConfig, "target_modules", [], "got an empty one"),
    ],
)
def test_a_field_that_was_changed_after_the_config_was_made(config, field, value, words, start):
    changed = config()
    setattr(changed, field, value)
    refuses(start(config), "other", changed, ValueError, words)


@each_method
def test_inputs_are_not_cast_where_peft_switches_it_off(config, layer):
    model = get_peft_model(prune_magnitude(tiny_llama()).bfloat16(), config(init_weights=False))
    layer = model.base_model.sparse_layers()[0]
    x = torch.randn(2, 32)
    with disable_input_dtype_casting(model):
        assert layer(x).dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x).dtype == torch.bfloat16
