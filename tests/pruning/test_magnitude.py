"""Magnitude pruning: exact counts in every layer, the right layers, and errors that leave the model as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude

import models


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2, models.tiny_bert])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_smallest_weights_of_every_layer_go(factory, sparsity: float):
    model, dense = factory(), factory()
    assert prune_magnitude(model, sparsity=sparsity) is model
    pruned = block_linears(model)
    for name, linear in block_linears(dense).items():
        before, after = get_weight(linear), get_weight(pruned[name])
        assert int((after == 0).sum()) == int(sparsity * before.numel())
        assert torch.equal(after[after != 0], before[after != 0])
        if sparsity:
            assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    inside = {f"{name}.weight" for name in pruned}
    for name, tensor in dense.state_dict().items():
        assert name in inside or torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("factory", [models.tiny_llama, models.tiny_gpt2])
@pytest.mark.parametrize(("pattern", "zeros"), [("2:4", 2), ("1:4", 3), ("4:8", 4)])
def test_n_m_holds_along_in_features(factory, pattern: str, zeros: int):
    model = prune_magnitude(factory(), pattern)
    m = int(pattern[-1])
    for linear in block_linears(model).values():
        assert ((get_weight(linear) == 0).reshape(-1, m).sum(1) == zeros).all()


def test_default_sparsity_is_one_half(tiny_llama):
    prune_magnitude(tiny_llama)
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in block_linears(tiny_llama).values())


def test_half_precision_ties_do_not_change_the_count(tiny_llama):
    model = prune_magnitude(tiny_llama.to(torch.bfloat16), sparsity=0.7)
    for linear in block_linears(model).values():
        assert linear.weight.dtype == torch.bfloat16
        assert int((linear.weight == 0).sum()) == int(0.7 * linear.weight.numel())


@pytest.mark.parametrize("exclude", [["k_proj", "mlp.up_proj"], r".*\.(k_proj|mlp\.up_proj)"])
def test_exclude_modules_as_in_peft(tiny_llama, exclude):
    prune_magnitude(tiny_llama, exclude_modules=exclude)
    for name, linear in block_linears(tiny_llama).items():
        assert bool((linear.weight == 0).any()) is not name.endswith(("k_proj", "mlp.up_proj")), name


def test_exclude_modules_that_name_nothing(tiny_llama):
    with pytest.warns(UserWarning, match="which is none"):
        prune_magnitude(tiny_llama, exclude_modules=["w_proj"])


def test_target_modules_of_which_one_names_nothing(tiny_llama):
    with pytest.warns(UserWarning, match=r"linears to prune, got \['kproj'\], which are none"):
        prune_magnitude(tiny_llama, target_modules=["q_proj", "kproj"])
    pruned = {name.split(".")[-1] for name, linear in block_linears(tiny_llama).items() if (linear.weight == 0).any()}
    assert pruned == {"q_proj"}


def test_a_model_without_blocks_needs_target_modules():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"Sequential has no list of such blocks; name .* `target_modules`"):
        prune_magnitude(model)
    with pytest.raises(ValueError, match="got none in Sequential for target_modules="):
        prune_magnitude(model, target_modules=["3"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    prune_magnitude(model, target_modules=["0"])
    assert int((model[0].weight == 0).sum()) == 32
    assert (model[2].weight != 0).all()


def test_weights_shared_with_an_embedding_are_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 8)
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "tied": nn.Linear(8, 8)})])
            self.blocks[0]["tied"].weight = self.embedding.weight

    model = prune_magnitude(Tied())
    assert (model.embedding.weight != 0).all()
    assert int((model.blocks[0]["up"].weight == 0).sum()) == 32
    with pytest.raises(ValueError, match="1 that share a weight with another module"):
        prune_magnitude(model, target_modules=["tied"])


def test_a_tied_head_is_left_alone(tiny_gpt2):
    head = tiny_gpt2.lm_head.weight.clone()
    prune_magnitude(tiny_gpt2)
    assert torch.equal(tiny_gpt2.lm_head.weight, head)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"lies in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"lies in \[0, 1\), got -0.1"),
        ({"sparsity": np.float32(0.5)}, r"got .*0.5.*; take a Python number"),
        ({"sparsity": "half"}, r"lies in \[0, 1\), got 'half'"),
        ({"pattern": "4:2"}, "0 < N < M, got 4:2"),
        ({"pattern": "two:four"}, "got 'two:four'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "fixes the sparsity at 0.5, got sparsity=0.6"),
        ({"pattern": "1:7"}, "divisible by 7, got 32 in `model.layers.0.self_attn.q_proj`; exclude it"),
        ({"pattern": "2:4", "sparsity": "half"}, "fixes the sparsity at 0.5, got sparsity='half'"),
        ({"exclude_modules": ".*"}, "at least one linear, got none"),
        ({"target_modules": "(q_proj"}, r"a regular expression for full names, got '\(q_proj', which is none"),
    ],
)
def test_errors_leave_the_model_untouched(tiny_llama, arguments, message: str):
    before = state_of(tiny_llama)
    with pytest.raises(ValueError, match=message):
        prune_magnitude(tiny_llama, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_broken_weights_are_refused(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    first = tiny_llama.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"1 NaN or infinite ones of 1536 in `model.layers.1.mlp.down_proj`"):
        prune_magnitude(tiny_llama)
    assert (first != 0).all()


def test_weights_that_are_not_in_memory_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="on the meta device"):
        prune_magnitude(tiny_llama.to("meta"))


def test_a_model_with_adapters_is_refused(tiny_llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj`, which carries an adapter .*merge_and_unload"):
        prune_magnitude(model)
    prune_magnitude(model.merge_and_unload())


def test_pruning_twice_changes_nothing(tiny_llama):
    once = state_of(prune_magnitude(tiny_llama, "2:4"))
    twice = prune_magnitude(tiny_llama, "2:4").state_dict()
    assert all(torch.equal(tensor, once[name]) for name, tensor in twice.items())


def test_a_tied_head_that_was_named_is_left_alone_with_a_warning(tiny_gpt2):
    head = tiny_gpt2.lm_head.weight.clone()
    with pytest.warns(
        UserWarning, match=r"got `lm_head` \(1 in all\), whose weight is also that of `transformer\.wte`"
    ):
        prune_magnitude(tiny_gpt2, sparsity=0.5, target_modules=["lm_head", "c_attn"])
    assert torch.equal(tiny_gpt2.lm_head.weight, head)
    assert (tiny_gpt2.transformer.h[0].attn.c_attn.weight == 0).any()
