"""What competes with what, for all pruners: rows or whole layers, exact in each, and contradictions refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.linears import block_linears, get_weight
from peft_sparse.pruning import prune_magnitude, prune_ria, prune_sparsegpt, prune_wanda
from peft_sparse.sparsity import NM, Unstructured, parse_pattern, pattern_with_group

import models


def random_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, models.VOCAB_SIZE, (2, 16), generator=generator)} for _ in range(2)]


def with_data(prune):
    return lambda model, *rest, **options: prune(model, random_batches(), *rest, progress=False, **options)


PRUNERS = {
    "magnitude": prune_magnitude,
    "wanda": with_data(prune_wanda),
    "sparsegpt": with_data(prune_sparsegpt),
    "ria": with_data(prune_ria),
}
DEFAULTS = {"magnitude": "layer", "wanda": "row", "sparsegpt": "layer", "ria": "layer"}
each_pruner = pytest.mark.parametrize("name", PRUNERS)


def zeros_of(model) -> list[torch.Tensor]:
    return [get_weight(linear) == 0 for linear in block_linears(model).values()]


def assert_counts(model, group: str, sparsity: float) -> None:
    for zeros in zeros_of(model):
        if group == "row":
            assert (zeros.sum(1) == int(sparsity * zeros.shape[1])).all()
        else:
            assert zeros.sum() == int(sparsity * zeros.numel())


@each_pruner
@settings(max_examples=12, deadline=None)
@given(
    sparsity=st.floats(0, 0.99),
    group=st.sampled_from(["row", "layer"]),
    factory=st.sampled_from([models.tiny_llama, models.tiny_gpt2]),
)
def test_exact_in_every_group(name: str, sparsity: float, group: str, factory):
    model = factory()
    PRUNERS[name](model, "unstructured", sparsity, group=group)
    assert_counts(model, group, sparsity)


@each_pruner
def test_default_is_the_papers(name: str):
    model, explicit, other = (models.tiny_gpt2() for _ in range(3))
    PRUNERS[name](model, sparsity=0.53)
    PRUNERS[name](explicit, sparsity=0.53, group=DEFAULTS[name])
    PRUNERS[name](other, sparsity=0.53, group={"layer": "row", "row": "layer"}[DEFAULTS[name]])
    assert_counts(model, DEFAULTS[name], 0.53)
    assert all(map(torch.equal, zeros_of(model), zeros_of(explicit)))
    assert not all(map(torch.equal, zeros_of(model), zeros_of(other)))


@each_pruner
@pytest.mark.parametrize("group", ["row", "layer"])
def test_a_pattern_object_says_its_group(name: str, group: str):
    model, by_name = models.tiny_llama(), models.tiny_llama()
    PRUNERS[name](model, Unstructured(group), 0.4)
    PRUNERS[name](by_name, "unstructured", 0.4, group=group)
    assert all(map(torch.equal, zeros_of(model), zeros_of(by_name)))


@each_pruner
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "2:4", "group": "row"}, r"got 2:4 with group='row'; leave `group` out"),
        ({"pattern": NM(2, 4), "group": "layer"}, r"got 2:4 with group='layer'"),
        ({"pattern": Unstructured("row"), "group": "layer"}, r"group='row'\) says .* got group='layer' beside it"),
        ({"group": "block"}, r"'layer' \(all of them\) or 'row' \(those of one output\), got 'block'"),
        ({"pattern": "2:4", "group": "block"}, "got 'block'"),
    ],
)
def test_contradictions_are_refused(name: str, arguments, message: str, tiny_llama):
    before = {key: tensor.clone() for key, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PRUNERS[name](tiny_llama, **arguments)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny_llama.state_dict().items())


@each_pruner
def test_a_share_for_each_layer(name: str, tiny_llama):
    budget = {layer: (0.31 * index) % 0.9 for index, layer in enumerate(block_linears(tiny_llama))}
    PRUNERS[name](tiny_llama, sparsity=budget, group="layer")
    for layer, linear in block_linears(tiny_llama).items():
        assert (linear.weight == 0).sum() == int(budget[layer] * linear.weight.numel()), layer
    with pytest.raises(ValueError):
        PRUNERS[name](models.tiny_llama(), sparsity={"no.such.layer": 0.5})
    with pytest.raises(ValueError, match=r"2:4 fixes the sparsity of every linear at 0\.5"):
        PRUNERS[name](models.tiny_llama(), "2:4", sparsity=dict.fromkeys(budget, 0.6))


def test_reading_a_pattern_with_its_group():
    assert pattern_with_group("unstructured", None, "row") == Unstructured("row")
    assert pattern_with_group("unstructured", "layer", "row") == Unstructured("layer")
    assert pattern_with_group("2:4", None, "row") == NM(2, 4)
    assert pattern_with_group(Unstructured("layer"), None, "row") == Unstructured("layer")
    assert pattern_with_group(Unstructured("row"), "row", "layer") == parse_pattern("unstructured", "row")
    with pytest.raises(ValueError, match="got 'column'"):
        Unstructured("column")
