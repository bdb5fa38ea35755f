"""What is PST's own: exact counts, the schedule as state, and being told when it never moved."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_sparse import PstConfig, save_sparse
from peft_sparse.linears import block_linears, get_weight, num_zeros
from peft_sparse.pruning import prune_magnitude
from peft_sparse.tuners.pst import PstLinear, set_sparsity_step

from models import tiny_bert, tiny_gpt2, tiny_llama


def pst_layers(model) -> list[PstLinear]:
    return [module for module in model.modules() if isinstance(module, PstLinear)]


def one_linear(config: PstConfig, out=10, columns=24, dtype=torch.float32) -> tuple[nn.Module, PstLinear]:
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(nn.Linear(columns, out).to(dtype)), config)
    return model, pst_layers(model)[0]


@pytest.mark.parametrize("importance", ["pst", "movement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_at_every_step(importance, dtype):
    """Movement scores start as one big tie; bfloat16 weights tie by the dozen."""
    config = PstConfig(sparsity=0.9, importance=importance)
    model, layer = one_linear(config, out=33, columns=20, dtype=dtype)
    seen = []
    for step in range(21):
        model.base_model.set_sparsity_step(step, 20)
        seen.append(int((~layer.get_mask("default")).sum()))
        assert seen[-1] == int(layer.pst_pruned["default"])
    assert seen[:3] == [0, 0, 0] and seen == sorted(seen) and seen[-1] == seen[14] == int(0.9 * 33 * 20)


@pytest.mark.parametrize(
    "pattern, counts", [("2:4", {0, 1, 2}), ("1:4", {0, 1, 2, 3}), ("2:3", {0, 1}), ("4:8", {0, 1, 2, 3, 4})]
)
@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_n_m_ramp_prunes_the_same_number_in_every_group(pattern, counts, schedule):
    n, m = map(int, pattern.split(":"))
    model, layer = one_linear(PstConfig(pattern=pattern, schedule=schedule))
    seen = set()
    for step in range(51):
        model.base_model.set_sparsity_step(step, 50)
        per_group = (~layer.get_mask("default")).reshape(-1, m).sum(1)
        assert per_group.min() == per_group.max()
        seen.add(int(per_group[0]))
    assert seen == counts and int(per_group[0]) == m - n


def test_scores_are_those_that_the_mask_was_selected_from_inside_of_autocast_too():
    _, layer = one_linear(PstConfig(schedule="constant", sparsity=0.5, init_weights=False))
    scores = layer.get_scores("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.get_scores("default"), scores)
        kept = layer.get_mask("default")
    assert scores[kept].min() >= scores[~kept].max()


def test_constant_schedule_is_sparse_from_the_start():
    _, layer = one_linear(PstConfig(schedule="constant", sparsity=0.5))
    assert (~layer.get_mask("default")).sum() == 120


def test_initial_sparsity_holds_before_the_first_step():
    model, layer = one_linear(PstConfig(initial_sparsity=0.25, sparsity=0.5))
    assert (~layer.get_mask("default")).sum() == 60
    model.base_model.set_sparsity_step(10, 10)
    assert (~layer.get_mask("default")).sum() == 120


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_ends_at_the_final_count_without_warm_ups(schedule):
    config = PstConfig(schedule=schedule, sparsity=0.7, initial_warmup=0.0, final_warmup=0.0)
    model, layer = one_linear(config)
    model.base_model.set_sparsity_step(7, 7)
    assert int(layer.pst_pruned["default"]) == int(0.7 * 240)


def test_step_0_is_magnitude_pruning():
    """At the start W' = W and S = |W|, for each importance that looks at the weights."""
    expected = {
        name: get_weight(m) != 0 for name, m in block_linears(prune_magnitude(tiny_gpt2(), sparsity=0.6)).items()
    }
    for importance in ("pst", "magnitude"):
        model = get_peft_model(tiny_gpt2(), PstConfig(sparsity=0.6, importance=importance, schedule="constant"))
        masks = {
            name: m.get_mask("default")
            for name, m in model.base_model.model.named_modules()
            if isinstance(m, PstLinear)
        }
        assert masks.keys() == expected.keys()
        assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_state_survives_a_cast_of_the_whole_model(cast):
    model, layer = one_linear(PstConfig(sparsity=0.9), out=64, columns=64)
    model.base_model.set_sparsity_step(1, 1)
    model.to(cast)
    assert int(layer.pst_pruned["default"]) == int(0.9 * 4096) and layer.pst_pruned["default"].dtype == torch.int64
    assert (~layer.get_mask("default")).sum() == int(0.9 * 4096)


def test_unit_starts_as_the_base_with_columns_of_length_1(tmp_path):
    config = PstConfig(sparsity=0.5, r=16, init_weights="unit")
    model, layer = one_linear(config, out=400, columns=20)
    U = layer.pst_U["default"]
    torch.testing.assert_close(U.detach().norm(dim=0), torch.ones(16), atol=0.2, rtol=0)
    assert 0.9 < layer.pst_A["default"].std() < 1.1
    x = torch.randn(3, 20)
    assert torch.equal(model(x), layer.base_layer(x))
    model.base_model.set_sparsity_step(1, 1)
    nn.init.normal_(layer.pst_V["default"])
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    assert PstConfig.from_pretrained(tmp_path).init_weights == "unit"
    loaded = PeftModel.from_pretrained(nn.Sequential(layer.base_layer), tmp_path)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("update", ["full", "none"])
def test_unit_is_about_the_update_of_low_rank(update):
    with pytest.raises(ValueError, match=f"\"unit\" is about U .* got weight_update='{update}'; leave `init_weights`"):
        PstConfig(weight_update=update, init_weights="unit")
    with pytest.raises(ValueError, match="True or False, got 'units', or 'unit' to start with a smaller U"):
        PstConfig(init_weights="units")


def test_number_of_trainable_parameters():
    """(r + score_r)(in + out) + in + out for each linear."""
    model, _ = one_linear(PstConfig(r=8, score_r=4), out=10, columns=24)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (8 + 4) * 34 + 34


def test_no_mask_is_saved(tmp_path):
    from safetensors import safe_open

    model, _ = one_linear(PstConfig(sparsity=0.9, schedule="constant"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key.rsplit(".", 1)[1]: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == {
        "pst_U": (10, 8), "pst_V": (8, 24), "pst_A": (10, 8), "pst_B": (8, 24), "pst_R": (10,), "pst_C": (24,),
        "pst_pruned": (),
    }  # fmt: skip


def test_merged_zeros_are_the_mask_of_the_last_forward():
    model = get_peft_model(tiny_bert(), PstConfig(sparsity=0.9, init_weights=False))
    model.base_model.set_sparsity_step(3, 3)
    masks = {n: m.get_mask("default") for n, m in model.base_model.model.named_modules() if isinstance(m, PstLinear)}
    for name, linear in block_linears(model.merge_and_unload()).items():
        assert torch.equal(get_weight(linear) != 0, masks[name])


def test_merged_zeros_have_no_sign(tmp_path):
    """Of a masked negative weight neither, so a merged model is packed bit for bit, without the warning that some were
    turned."""
    model = get_peft_model(tiny_llama(), PstConfig(schedule="constant", sparsity=0.9)).merge_and_unload()
    assert not any((torch.signbit(get_weight(linear)) & (get_weight(linear) == 0)).any()
                   for linear in block_linears(model).values())  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sparse(model, tmp_path)


# Being told


def message_of(action) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    told = [str(w.message) for w in caught if "schedule" in str(w.message)]
    assert len(told) <= 1
    return told[0] if told else None


def test_a_schedule_that_never_advanced_is_told_at_save(tmp_path):
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    told = message_of(lambda: model.save_pretrained(tmp_path))
    assert all(words in told for words in ("0.0%", "50.0%", "never advanced", "SparsityCallback", "set_sparsity_step"))


def test_a_schedule_that_never_advanced_is_told_at_merge():
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    told = message_of(lambda: model.merge_adapter())
    assert all(words in told for words in ("0.0%", "50.0%", "never advanced", "SparsityCallback", "set_sparsity_step"))
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    model.base_model.set_sparsity_step(40, 100)
    assert "stopped on the way" in message_of(lambda: model.merge_and_unload())


def test_a_schedule_that_did_its_work_says_nothing(tmp_path):
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    model.base_model.set_sparsity_step(0, 100)
    assert message_of(lambda: model.save_pretrained(tmp_path / "warm-up")) is None
    model.base_model.set_sparsity_step(100, 100)
    assert message_of(lambda: model.save_pretrained(tmp_path / "end")) is None
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "end")
    assert message_of(lambda: loaded.save_pretrained(tmp_path / "again")) is None
    assert message_of(lambda: loaded.merge_and_unload()) is None


# Driving several adapters


def test_only_trainable_adapters_are_driven_when_several_are_active():
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5), adapter_name="a")
    model.base_model.set_sparsity_step(10, 10)
    model.add_adapter("b", PstConfig(sparsity=0.8))
    model.base_model.set_adapter(["a", "b"])
    model.set_requires_grad("a", False)
    set_sparsity_step(model, 0, 10)
    for layer in pst_layers(model):
        assert int(layer.pst_pruned["a"]) == int(0.5 * layer.base_weight.numel())
        assert int(layer.pst_pruned["b"]) == 0


def test_a_finished_adapter_keeps_its_sparsity_beside_one_on_other_layers():
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5, target_modules=["q_proj"]), adapter_name="a")
    model.base_model.set_sparsity_step(10, 10)
    model.add_adapter("b", PstConfig(sparsity=0.8, target_modules=["up_proj"]))
    model.base_model.set_adapter(["a", "b"])
    model.set_requires_grad("a", False)
    model.base_model.set_sparsity_step(0, 10)
    counts = {name: int(count) for layer in pst_layers(model) for name, count in layer.pst_pruned.items()}
    assert counts == {"a": 32 * 32 // 2, "b": 0}
    model.set_requires_grad("b", False)
    with pytest.raises(ValueError, match=r"got \['a', 'b'\], all of them frozen; call `set_adapter`"):
        model.base_model.set_sparsity_step(10, 10)


def test_a_merged_adapter_stays_as_it_was_merged(tmp_path):
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    model.base_model.set_sparsity_step(5, 10)
    model.save_pretrained(tmp_path)
    counts = [int(layer.pst_pruned["default"]) for layer in pst_layers(model)]
    with pytest.warns(UserWarning, match="stopped on the way"):
        model.merge_adapter()
    layers = pst_layers(model)
    changes = [
        lambda: model.base_model.set_sparsity_step(10, 10),
        lambda: layers[0].set_sparsity_step("default", 10, 10),
    ]
    if hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):  # PEFT 0.20 does not ask before it loads
        changes.append(lambda: model.load_adapter(tmp_path, "default"))
    for change in changes:
        with pytest.raises(ValueError, match=r"not merged, got 'default' merged into .*`unmerge_adapter\(\)` first"):
            change()
    assert counts == [int(layer.pst_pruned["default"]) for layer in pst_layers(model)]
    model.unmerge_adapter()
    model.base_model.set_sparsity_step(10, 10)
    merged = block_linears(model.merge_and_unload())
    assert all(num_zeros(linear) == linear.weight.numel() // 2 for linear in merged.values())


def test_a_frozen_adapter_alone_is_driven(tmp_path):
    get_peft_model(tiny_llama(), PstConfig(sparsity=0.5)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model.base_model.set_sparsity_step(10, 10)
    assert all(int(la.pst_pruned["default"]) == la.base_weight.numel() // 2 for la in pst_layers(model))


def test_bad_steps_change_nothing():
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    for step, total, words in ((-1, 10, "from 0, got -1"), (1, 0, "got 0"), (1, None, "total_steps")):
        with pytest.raises(ValueError, match=words):
            model.base_model.set_sparsity_step(step, total)
    with pytest.raises(ValueError, match="without an active one"):
        set_sparsity_step(tiny_llama(), 1, 10)
    assert all(int(layer.pst_pruned["default"]) == 0 for layer in pst_layers(model))
