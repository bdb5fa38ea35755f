"""PST with a sparsity for each layer: each schedule ends at its own share, and all that keeps an adapter keeps it."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import PstConfig, SparsityCallback, owl_sparsity, prune_magnitude
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.sparsity import sparsity_at
from peft_sparse.tuners.pst import PstLinear

from models import VOCAB_SIZE, tiny_bert, tiny_gpt2, tiny_llama

PATTERN = {"q_proj": 0.5, r"model\.layers\.1\.mlp\..*": 0.95, "model.layers.1.mlp.up_proj": 0.7}


def pst_layers(model) -> dict[str, PstLinear]:
    inner = model.get_base_model()
    return {name: module for name, module in inner.named_modules() if isinstance(module, PstLinear)}


def expected_share(name: str, default: float = 0.8) -> float:
    if name.endswith("q_proj"):
        return 0.5
    if name == "model.layers.1.mlp.up_proj":
        return 0.7
    return 0.95 if "layers.1.mlp" in name else default


def pruned_counts(model, adapter: str = "default") -> dict[str, int]:
    return {name: int((~layer.get_mask(adapter)).sum()) for name, layer in pst_layers(model).items()}


def config(**settings) -> PstConfig:
    return PstConfig(sparsity=0.8, sparsity_pattern=dict(PATTERN), **settings)


@pytest.mark.parametrize("schedule", ["cubic", "linear", "constant"])
def test_every_layer_follows_the_schedule_to_its_own_share(schedule):
    model = get_peft_model(tiny_llama(), config(initial_sparsity=0.2, schedule=schedule))
    for step in (0, 5, 11, 15, 20):
        model.base_model.set_sparsity_step(step, 20)
        for name, count in pruned_counts(model).items():
            share = sparsity_at(schedule, step, 20, 0.2, expected_share(name))
            numel = pst_layers(model)[name].base_weight.numel()
            assert count == int(share * numel), (name, step)
    assert count == int(expected_share(name) * numel)


def test_the_schedule_starts_at_the_initial_sparsity_everywhere():
    model = get_peft_model(tiny_llama(), config(initial_sparsity=0.25))
    for name, count in pruned_counts(model).items():
        assert count == pst_layers(model)[name].base_weight.numel() // 4


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(tiny_llama(), config(init_weights=False))
    model.base_model.set_sparsity_step(13, 20)  # on the way
    masks = {name: layer.get_mask("default") for name, layer in pst_layers(model).items()}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["sparsity_pattern"] == PATTERN
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(torch.equal(layer.get_mask("default"), masks[name]) for name, layer in pst_layers(loaded).items())
    for either in (model, loaded):
        either.base_model.set_sparsity_step(20, 20)
    assert pruned_counts(loaded) == pruned_counts(model)
    assert all(
        count == int(expected_share(name) * pst_layers(model)[name].base_weight.numel())
        for name, count in pruned_counts(model).items()
    )


def test_merged_zeros_and_warnings():
    model = get_peft_model(tiny_llama(), config())
    model.base_model.set_sparsity_step(10, 20)
    share = sum(
        int(expected_share(name) * layer.base_weight.numel()) for name, layer in pst_layers(model).items()
    ) / sum(layer.base_weight.numel() for layer in pst_layers(model).values())
    with pytest.warns(UserWarning, match=rf"instead of {share:.1%}: its schedule stopped on the way"):
        model.merge_adapter()
    model.unmerge_adapter()
    model.base_model.set_sparsity_step(20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    for name, linear in block_linears(merged).items():
        assert int((linear.weight == 0).sum()) == int(expected_share(name) * linear.weight.numel())


def test_adapters_with_patterns_of_their_own():
    model = get_peft_model(tiny_llama(), config(), adapter_name="a")
    model.add_adapter("b", PstConfig(sparsity=0.6, sparsity_pattern={"k_proj": 0.1}))
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        model.base_model.set_sparsity_step(20, 20)
    numel = {name: layer.base_weight.numel() for name, layer in pst_layers(model).items()}
    assert pruned_counts(model, "a") == {name: int(expected_share(name) * n) for name, n in numel.items()}
    assert pruned_counts(model, "b") == {
        name: int((0.1 if name.endswith("k_proj") else 0.6) * n) for name, n in numel.items()
    }


@pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2, tiny_bert])
def test_the_allocation_of_a_pruner(factory):
    """OWL's shares give PST and a pruner the same number of zeros in each layer, and the budget in all."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 10))
    budget = owl_sparsity(factory(), [{"input_ids": ids}], 0.7, group="layer")
    pruned = prune_magnitude(factory(), sparsity=budget)
    model = get_peft_model(factory(), PstConfig(sparsity_pattern=budget, schedule="constant"))
    counts = pruned_counts(model)
    assert counts == {name: int((get_weight(m) == 0).sum()) for name, m in block_linears(pruned).items()}
    assert sum(counts.values()) == int(0.7 * sum(get_weight(m).numel() for m in block_linears(pruned).values()))


def test_the_callback_knows_when_all_layers_are_done(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_llama(), config())
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB_SIZE, (8, 6))]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[SparsityCallback(best_at_final_sparsity=True)]).train()
    for name, count in pruned_counts(model).items():
        assert count == int(expected_share(name) * pst_layers(model)[name].base_weight.numel())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_pattern": {"q_proj": 1.0}}, r"`sparsity_pattern\['q_proj'\]` .* lies in \[0, 1\), got 1.0"),
        ({"sparsity_pattern": {"(": 0.5}}, r"got '\(', which is no valid regex"),
        ({"sparsity_pattern": {1: 0.5}}, "names of linears or regexes for them, got 1"),
        ({"sparsity_pattern": 0.9}, "`sparsity_pattern` is a dict .* got 0.9; one share for all"),
        ({"pattern": "2:4", "sparsity_pattern": {"q_proj": 0.5}}, "2:4 fixes the sparsity of every layer at 0.5"),
        (
            {"initial_sparsity": 0.5, "sparsity_pattern": {"q_proj": 0.4}},
            r"got initial_sparsity=0.5 above sparsity_pattern\['q_proj'\]=0.4",
        ),
    ],
)
def test_configs_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PstConfig(**settings)


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_keys_that_name_no_adapted_layer(targets):
    """up_proj is in the model; with other targets it is none of the adapted layers."""
    model = tiny_llama()
    before = list(model.named_modules())
    key = "up_proj" if targets else "w_proj"
    with pytest.raises(ValueError, match=rf"Every key of `sparsity_pattern` .* got '{key}' \(1 of 2 keys\)"):
        get_peft_model(model, PstConfig(target_modules=targets, sparsity_pattern={"q_proj": 0.5, key: 0.5}))
    assert list(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_config_of_before_there_were_patterns(tmp_path):
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5, schedule="constant"))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored.pop("sparsity_pattern") == {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert pruned_counts(loaded) == pruned_counts(model)
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | {"sparsity_pattern": None}))
    assert pruned_counts(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == pruned_counts(model)
