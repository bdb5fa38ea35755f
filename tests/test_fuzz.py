"""Any value in any config field, and any damage to the files of an adapter.

Each is an error that leaves everything as it was, or the right result: never a hang, a crash, or another model that
nothing tells of. Packed checkpoints get the same treatment in tests/checkpoint/test_damage.py. Each law runs with a
small budget in the quick suite, and with a large one in the slow suite.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_sparse import PstConfig, SppConfig, prune_magnitude
from peft_sparse.linears import block_linears, get_weight, unwrap
from peft_sparse.tuners.pst import PstLinear

from models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {"pst": PstConfig, "spp": SppConfig}
IDS = torch.arange(3, 11)[None]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUICK, DEEP = 40, 300


def budget(examples: int) -> settings:
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=health)


# Values

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 2**63, 0.1 + 0.2, 1e-320, 1e308, math.nan, math.inf, -math.inf]),
    st.floats(0, 1),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["2:4", "1:3", "16:32", "unstructured", "q_proj", "all-linear", ".*_proj", "(", "SEQ_CLS", "full"]
    ),
    st.sampled_from(["low_rank", "none", "pst", "movement", "magnitude", "linear", "constant", "layers", "cubic"]),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=2)),
    max_leaves=4,
)


def fields_of(config_cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_cls)]


def changed_fields(draw: Callable, config_cls: type) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(fields_of(config_cls)), min_size=1, max_size=3, unique=True))
    return {name: draw(json_values) for name in names}


# What is the same afterwards


def state_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: (type(m), m.training) for name, m in model.named_modules()}
    found |= {f"{name}?": p.requires_grad for name, p in model.named_parameters()}
    return found | {f"{name}=": t.detach().clone() for name, t in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) if isinstance(value, torch.Tensor) else after[key] == value, key


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def assert_it_works(model: PeftModel) -> None:
    """A step, and a merge: the function stays, zeros are those of the mask, or those of the base model."""
    layers = {name: m for name, m in block_linears(model).items() if hasattr(m, "base_layer")}
    zeros = {name: get_weight(unwrap(layer)) == 0 for name, layer in layers.items()}
    if any(isinstance(layer, PstLinear) for layer in layers.values()):
        model.base_model.set_sparsity_step(7, 9)
        zeros = {name: ~layer.get_mask("default") for name, layer in layers.items()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = logits(model)
    if not before.isfinite().all():  # scales of 1e308 do that, and merging then says so
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter()
        return
    model.merge_adapter()
    scale = before.abs().max().clamp_min(1e-12)
    assert (logits(model) - before).abs().max() <= 1e-3 * scale
    for name, layer in layers.items():
        assert bool((get_weight(unwrap(layer)) == 0)[zeros[name]].all()), name


# Config fields


@pytest.mark.parametrize("name", ["beta", "alpha1", "alpha2"])
def test_scales_may_be_integers_that_no_tensor_takes(name):
    config = PstConfig(**{name: -(2**63) - 1})
    assert getattr(config, name) == -(2.0**63) and isinstance(getattr(config, name), float)
    assert_it_works(get_peft_model(tiny_llama(), config))


def any_field(method: str, data: st.DataObject) -> None:
    changes = changed_fields(data.draw, CONFIGS[method])
    try:
        config = CONFIGS[method](**changes)
    except ValueError as error:
        assert str(error)
        return
    json.dumps({k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})  # it can be saved
    base = tiny_llama() if method == "pst" else prune_magnitude(tiny_llama())
    before = state_of(base)
    try:
        model = get_peft_model(base, config)
    except ValueError:
        assert_unchanged(base, before)
        return
    if config.inference_mode or config.task_type not in (None, "CAUSAL_LM"):
        return
    assert_it_works(model)


# Files


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    torch.manual_seed(3)
    base, config = prune_magnitude(tiny_llama()), CONFIGS[request.param]()
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    if request.param == "pst":
        model.base_model.set_sparsity_step(6, 10)
    model.save_pretrained(folder)
    return folder


def read(folder: Path, base: nn.Module) -> PeftModel:
    return PeftModel.from_pretrained(base, folder)


def read_or_error(folder: Path, saved: Path) -> PeftModel | None:
    """An adapter that was read, or None after an error that changed nothing."""
    base = prune_magnitude(tiny_llama())
    before = state_of(base)
    try:
        return read(folder, base)
    except Exception as error:
        assert not isinstance(error, (AttributeError, AssertionError, IndexError, RecursionError, MemoryError)), error
        assert_unchanged(base, before)
        return None


def damage(data: st.DataObject, content: bytes, header: int) -> bytes:
    if data.draw(st.booleans(), "cut short"):
        return content[: data.draw(st.integers(0, len(content) - 1))]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
        damaged[place] ^= data.draw(st.integers(1, 255))
    return bytes(damaged)


def copy_of(saved: Path) -> Path:
    return Path(shutil.copytree(saved, saved.parent / "copy", dirs_exist_ok=True))


def any_bytes(saved: Path, data: st.DataObject) -> None:
    folder = copy_of(saved)
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = (saved / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name == WEIGHTS else len(content)
    (folder / name).write_bytes(damage(data, content, header))
    model = read_or_error(folder, saved)
    if model is not None:
        expected = read(saved, prune_magnitude(tiny_llama()))
        assert torch.equal(logits(model), logits(expected))
        assert_same_adapter(model, expected)


def assert_same_adapter(model: PeftModel, expected: PeftModel) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def any_entry(saved: Path, data: st.DataObject) -> None:
    """Edited on purpose: no checksums."""
    folder = copy_of(saved)
    entries = json.loads((saved / CONFIG).read_text())
    entries.pop("checksums")
    changes = changed_fields(data.draw, CONFIGS[saved.name])
    (folder / CONFIG).write_text(json.dumps(entries | changes))
    model = read_or_error(folder, saved)
    if model is not None and not changes.keys() & {"modules_to_save", "task_type", "revision", "peft_type"}:
        assert_has_the_tensors_of(folder, model)


def assert_has_the_tensors_of(folder: Path, model: PeftModel) -> None:
    """What was read is what is used: no tensor was left at its start, none was dropped."""
    tensors = load_file(folder / WEIGHTS)
    found = {key.replace(".default", ""): tensor for key, tensor in model.state_dict().items() if ".default" in key}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def any_bytes_on_resume(saved: Path, data: st.DataObject) -> None:
    """Into an adapter that is there, where PEFT reads no config, hence no checksum: an error, or what the file has."""
    folder = copy_of(saved)
    content = (saved / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(damage(data, content, 8 + int.from_bytes(content[:8], "little")))
    model = get_peft_model(prune_magnitude(tiny_llama()), CONFIGS[saved.name]())
    before = state_of(model)
    try:
        model.load_adapter(folder, "default")
    except Exception:
        assert_unchanged(model, before)
        return
    assert_has_the_tensors_of(folder, model)


def make(law: Callable, examples: int) -> Callable:
    return budget(examples)(given(data=st.data())(law))


@pytest.mark.parametrize("method", CONFIGS)
def test_any_value_in_any_field(method):
    make(lambda data: any_field(method, data), QUICK)()


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_any_value_in_any_field_deep(method):
    make(lambda data: any_field(method, data), DEEP)()


@pytest.mark.parametrize("law", [any_bytes, any_entry, any_bytes_on_resume], ids=lambda law: law.__name__)
def test_files(law, saved):
    make(lambda data: law(saved, data), QUICK)()


@pytest.mark.slow
@pytest.mark.parametrize("law", [any_bytes, any_entry, any_bytes_on_resume], ids=lambda law: law.__name__)
def test_files_deep(law, saved):
    make(lambda data: law(saved, data), DEEP)()


def test_every_byte_of_a_number_counts(saved):
    """Not by chance: a flipped bit in each of many places."""
    folder, content = copy_of(saved), (saved / WEIGHTS).read_bytes()
    for place in range(8, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            type(CONFIGS[saved.name]()).from_pretrained(folder)


@pytest.mark.usefixtures("transformers_adapters")
def test_saving_over_an_adapter(saved):
    """Through PEFT, and through transformers, which writes the config before the weights."""
    folder, config_cls = copy_of(saved), CONFIGS[saved.name]
    for _ in range(2):
        model = prune_magnitude(tiny_llama())
        model.add_adapter(config_cls())
        model.save_pretrained(folder)
        assert_has_the_tensors_of(folder, read(folder, prune_magnitude(tiny_llama())))
        model = get_peft_model(prune_magnitude(tiny_llama()), config_cls())
        model.save_pretrained(folder)
        assert_has_the_tensors_of(folder, read(folder, prune_magnitude(tiny_llama())))


def test_a_config_from_the_hub(saved, tmp_path, monkeypatch):
    """Its weights are not here yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft.config.hf_hub_download", lambda repository, name, **kwargs: str(saved / name))
    assert CONFIGS[saved.name].from_pretrained("owner/name").checksums is None


def test_what_was_saved_is_read(saved):
    model = read(saved, prune_magnitude(tiny_llama()))
    assert model.peft_config["default"].checksums is None
    assert_has_the_tensors_of(saved, model)
    again = saved.parent / "again"
    model.save_pretrained(again)
    assert (again / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert (
        json.loads((again / CONFIG).read_text())["checksums"] == json.loads((saved / CONFIG).read_text())["checksums"]
    )
