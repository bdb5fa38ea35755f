"""Budgets on models: mappings, exact totals, and OWL against a plain computation."""

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from peft_sparse import owl_sparsity, prune_magnitude, prune_wanda, uniform_sparsity
from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import resolve_sparsities
from peft_sparse.sparsity import parse_pattern

import models


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, 10))} for _ in range(count)]


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((get_weight(linear) == 0).sum()) for name, linear in block_linears(model).items()}


def total(model: nn.Module) -> int:
    return sum(get_weight(linear).numel() for linear in block_linears(model).values())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


PRUNERS = {
    "magnitude": lambda model, sparsity: prune_magnitude(model, sparsity=sparsity),
    "wanda": lambda model, sparsity: prune_wanda(model, batches(), sparsity=sparsity, progress=False),
}


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_mapping_of_names_ends_and_regexes(tiny_llama, pruner):
    mapping = {"q_proj": 0.25, r"model\.layers\.1\.mlp\..*": 0.75, "model.layers.1.mlp.up_proj": 0.0, ".*": 0.5}
    PRUNERS[pruner](tiny_llama, mapping)
    for name, linear in block_linears(tiny_llama).items():
        share = float((linear.weight == 0).float().mean())
        if name == "model.layers.1.mlp.up_proj":
            assert share == 0
        elif name.endswith("q_proj"):
            assert share == 0.25
        else:
            assert share == (0.75 if "layers.1.mlp" in name else 0.5)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"q_proj": 0.5}, r"got none for `model.layers.0.self_attn.k_proj`, .* \(12 of 14\); add a key"),
        ({".*": 0.5, "w_proj": 0.4}, r"got 'w_proj' \(1 of 2 keys\), which name none"),
        ({".*": 1.0}, r"`sparsity\['\.\*'\]` .* lies in \[0, 1\), got 1.0"),
        ({"(": 0.5}, r"got '\(', which is no valid regex"),
        ({3: 0.5}, "names of linears or regexes for them, got 3"),
        ({}, r"got none for .* \(14 of 14\)"),
    ],
)
def test_mappings_that_are_refused(tiny_llama, pruner, mapping, message):
    before = state_of(tiny_llama)
    with pytest.raises(ValueError, match=message):
        PRUNERS[pruner](tiny_llama, mapping)
    assert_same(tiny_llama, before)


def test_n_m_takes_no_mapping(tiny_llama):
    before = state_of(tiny_llama)
    with pytest.raises(ValueError, match=r"2:4 fixes the sparsity of every linear at 0.5, got a mapping"):
        prune_wanda(tiny_llama, batches(), "2:4", {".*": 0.5}, progress=False)
    with pytest.raises(ValueError, match=r"2:4 fixes the sparsity of every linear at 0.5, got a mapping"):
        prune_magnitude(tiny_llama, "2:4", {".*": 0.5})
    assert_same(tiny_llama, before)


def test_resolve_sparsities_of_a_number():
    targets = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    assert resolve_sparsities(targets, parse_pattern("unstructured"), None) == {"a": 0.5, "b": 0.5}
    assert resolve_sparsities(targets, parse_pattern("unstructured"), 0.3) == {"a": 0.3, "b": 0.3}
    assert resolve_sparsities(targets, parse_pattern("1:4"), None) == {"a": 0.75, "b": 0.75}


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.613, 0.9])
def test_a_uniform_budget_is_met_exactly(factory, sparsity):
    model = factory()
    prune_magnitude(model, sparsity=uniform_sparsity(model, sparsity))
    assert sum(zeros(model).values()) == int(sparsity * total(model))


@pytest.mark.parametrize("sparsity", [0.37, 0.613, 0.9])
def test_a_uniform_budget_over_rows_is_met_as_near_as_rows_allow(sparsity):
    model = models.tiny_llama()
    prune_wanda(model, batches(), sparsity=uniform_sparsity(model, sparsity, group="row"), progress=False)
    assert abs(sum(zeros(model).values()) - int(sparsity * total(model))) <= 8  # half of the smallest layer's 16 rows
    for linear in block_linears(model).values():
        assert (linear.weight == 0).sum(1).unique().numel() == 1


def naive_outlier_ratios(model, data, threshold: float) -> list[float]:
    """By hooks on the whole dense model, one number for each of the two blocks."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, linear in block_linears(model).items():

        def add(_, args, name=name):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        hooks.append(linear.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    ratios = []
    for block in (".0.", ".1."):
        entries = torch.cat(
            [
                (get_weight(linear).abs() * sums[name].sqrt()).flatten()
                for name, linear in block_linears(model).items()
                if block in name
            ]
        )
        ratios.append(float((entries > threshold * entries.mean()).double().mean()))
    return ratios


def with_outliers(model):
    """The second block's inputs have a few large columns, as in language models."""
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:2] = 30.0
        model.model.layers[1].post_attention_layernorm.weight[5] = 50.0
    return model


def test_owl_against_a_plain_computation(tiny_llama):
    model, data = with_outliers(tiny_llama), batches()
    before = state_of(model)
    first, second = naive_outlier_ratios(model, data, 5.0)
    assert second > 2 * first
    budget = owl_sparsity(model, data, 0.6, group="layer")
    assert_same(model, before)
    assert budget.keys() == block_linears(model).keys()
    for name, share in budget.items():  # equal blocks: half a range above and below the mean
        assert share == pytest.approx(0.68 if ".0." in name else 0.52, abs=2e-3)
    prune_magnitude(model, sparsity=budget)
    assert sum(zeros(model).values()) == int(0.6 * total(model))


def test_owl_for_rows_is_exact_for_wanda(tiny_llama):
    model, data = with_outliers(tiny_llama), batches()
    prune_wanda(model, data, sparsity=owl_sparsity(model, data, 0.6), progress=False)
    assert abs(sum(zeros(model).values()) - int(0.6 * total(model))) <= 8


def test_owl_by_linear(tiny_llama):
    model, data = with_outliers(tiny_llama), batches()
    budget = owl_sparsity(model, data, 0.5, level="linear", lam=0.1, outlier_threshold=3.0, group="layer")
    assert len({round(share, 2) for share in budget.values()}) > 4
    assert max(budget.values()) - min(budget.values()) == pytest.approx(0.2, abs=2e-3)
    prune_magnitude(model, sparsity=budget)
    assert sum(zeros(model).values()) == int(0.5 * total(model))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_owl_is_the_same_however_sequences_are_batched(device):
    """OPT's MLP sees all tokens in one row after another, where a batch of several sequences looks like one."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=models.VOCAB_SIZE, word_embed_proj_dim=32, **sizes)).eval()
    ids = torch.randint(3, models.VOCAB_SIZE, (8, 10))
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.weight *= torch.randn(len(linear.weight), 1).exp() * torch.randn(linear.weight.shape[1]).exp()
    rows, mask = [{"input_ids": row[None]} for row in ids], {"attention_mask": torch.ones_like(ids)}
    budgets = [owl_sparsity(model, data, device=device) for data in (rows, [{"input_ids": ids}])]
    budgets.append(owl_sparsity(model, [{"input_ids": ids, **mask}], device=device))
    assert len(set(budgets[0].values())) > 1
    for budget in budgets[1:]:
        assert budget == pytest.approx(budgets[0], abs=2e-3)


@pytest.mark.parametrize("factory", [models.tiny_gpt2, models.tiny_bert])
def test_owl_on_other_architectures(factory):
    model = factory()
    prune_magnitude(model, sparsity=owl_sparsity(model, batches(), 0.7, group="layer"))
    assert sum(zeros(model).values()) == int(0.7 * total(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.97}, r"met with a sparsity in \[0, 1\) in each, got 1.05 for .* \(a smaller `lam`\)"),
        ({"sparsity": 1.2}, r"lies in \[0, 1\), got 1.2"),
        ({"lam": 17 * 10**307}, r"with a sparsity in \[0, 1\) in each, got nan"),
        ({"lam": -1}, "`lam` is a finite number of at least 0, got -1"),
        ({"outlier_threshold": float("nan")}, "`outlier_threshold` is a finite number of at least 0, got nan"),
        ({"outlier_threshold": 10**400}, "`outlier_threshold` is a finite number of at least 0, got 1000"),
        ({"level": "head"}, "`level` should be 'block' or 'linear', got 'head'"),
        ({"group": "column"}, "`group` should be 'layer' or 'row', got 'column'"),
        ({"target_modules": ["lm_head"]}, "got `lm_head`, outside of them"),
    ],
)
def test_owl_errors_leave_the_model_untouched(tiny_llama, arguments, message):
    model = with_outliers(tiny_llama)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        owl_sparsity(model, batches(), **arguments)
    assert_same(model, before)


def test_target_modules_of_a_calibrated_pruner(tiny_llama):
    prune_wanda(tiny_llama, batches(), target_modules=["mlp.up_proj", "q_proj"], progress=False)
    for name, count in zeros(tiny_llama).items():
        assert bool(count) is name.endswith(("up_proj", "q_proj")), name
    with pytest.raises(ValueError, match=r"got `lm_head`, outside of them; take it out .* `prune_magnitude`"):
        prune_wanda(tiny_llama, batches(), target_modules=["lm_head"], progress=False)
    with pytest.raises(ValueError, match="got none in LlamaForCausalLM for target_modules="):
        prune_wanda(tiny_llama, batches(), target_modules=["w_proj"], progress=False)
