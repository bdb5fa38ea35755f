"""Budgets: counts that add up whatever the shares are, and floats that give their counts back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.sparsity import LayerSize, Unstructured, owl_sparsities, sparsities_by_name, uniform_sparsities
from peft_sparse.sparsity.budgets import exact_budget, matching_key, share_of_count

layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=9)
shares = st.floats(0, 0.999)


def zeros_of(budget: dict[str, float], shapes: list[tuple[int, int]], group: str) -> int:
    """As a pruner counts."""
    pattern, total = Unstructured(group), 0
    for share, shape in zip(budget.values(), shapes, strict=True):
        size = pattern.group_size(shape)
        total += pattern.num_pruned(share, size) * (math.prod(shape) // size)
    return total


def sizes_of(shapes, group: str) -> dict[str, LayerSize]:
    return {str(i): LayerSize(o * n, o if group == "row" else 1) for i, (o, n) in enumerate(shapes)}


@given(layers, shares)
def test_a_uniform_budget_is_exact(shapes, sparsity):
    wanted = int(sparsity * sum(map(math.prod, shapes)))
    if wanted > sum(math.prod(shape) - 1 for shape in shapes):  # a share is below 1, so one weight stays in each
        with pytest.raises(ValueError, match=r"leaves at least one weight .* ask for a lower `sparsity`"):
            uniform_sparsities(sizes_of(shapes, "layer"), sparsity)
        return
    budget = uniform_sparsities(sizes_of(shapes, "layer"), sparsity)
    assert zeros_of(budget, shapes, "layer") == wanted
    for share, shape in zip(budget.values(), shapes, strict=True):
        assert 0 <= share < 1
        if all(math.prod(other) * (1 - sparsity) > 2 for other in shapes):  # none is full
            assert abs(share - sparsity) <= 1.01 / math.prod(shape)


@given(layers, shares)
def test_rows_come_as_near_as_a_unit(shapes, sparsity):
    try:
        budget = uniform_sparsities(sizes_of(shapes, "row"), sparsity)
    except ValueError:  # one weight has to stay in every row
        assert int(sparsity * sum(map(math.prod, shapes))) > sum(o * (n - 1) for o, n in shapes)
        return
    missing = int(sparsity * sum(map(math.prod, shapes))) - zeros_of(budget, shapes, "row")
    room = [o for (o, n), share in zip(shapes, budget.values(), strict=True) if int(share * n) < n - 1]
    assert missing <= min(room, default=math.inf) / 2 or not room
    assert missing >= -max(o for o, _ in shapes) / 2
    assert zeros_of(budget, shapes, "layer") == zeros_of(budget, shapes, "row")  # it means the same to either group


@given(st.integers(1, 5000), st.integers(1, 50), st.data())
def test_a_share_gives_its_count_back(size, unit, data):
    count = data.draw(st.integers(0, size - 1))
    share = share_of_count(count, LayerSize(size * unit, unit))
    assert int(share * size) == count and int(share * size * unit) == count * unit
    assert share == pytest.approx(count / size, abs=1e-12)


@given(st.lists(st.tuples(st.integers(60, 400), st.floats(0, 0.1)), min_size=1, max_size=8), st.floats(0.2, 0.75))
def test_owl_meets_the_budget_in_order_of_the_outliers(blocks, sparsity):
    sizes = {str(i): LayerSize(numel) for i, (numel, _) in enumerate(blocks)}
    ratios = {str(i): ratio for i, (_, ratio) in enumerate(blocks)}
    budget = owl_sparsities(ratios, sizes, sparsity, lam=0.08)
    total = sum(size.numel for size in sizes.values())
    assert sum(int(share * sizes[name].numel) for name, share in budget.items()) == int(sparsity * total)
    for a in sizes:
        for b in sizes:
            rounding = 1.01 / sizes[a].numel + 1.01 / sizes[b].numel
            assert ratios[a] <= ratios[b] or budget[a] <= budget[b] + rounding
            assert abs(budget[a] - budget[b]) <= 0.16 + rounding


def test_owl_by_hand():
    """Equal blocks with ratios 0, 1 and 4 of 4: shifts 0, -0.04 and -0.16, less their mean."""
    sizes = dict.fromkeys("abc", LayerSize(30000))
    budget = owl_sparsities({"a": 0.01, "b": 0.02, "c": 0.05}, sizes, 0.6, lam=0.08)
    mean = -0.2 / 3
    assert list(budget.values()) == pytest.approx([0.6 - mean, 0.56 - mean, 0.44 - mean], abs=1e-4)


def test_blocks_without_a_difference_are_pruned_alike():
    budget = owl_sparsities({"a": 0.02, "b": 0.02}, {"a": LayerSize(100), "b": LayerSize(100)}, 0.7, lam=0.08)
    assert list(budget.values()) == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize(("sparsity", "lam", "value"), [(0.97, 0.08, "1.05"), (0.02, 0.08, "-0.06")])
def test_a_budget_that_no_sparsity_meets(sparsity, lam, value):
    sizes = {"a": LayerSize(100), "b": LayerSize(100)}
    with pytest.raises(ValueError, match=rf"a sparsity in \[0, 1\) in each, got {value} for `[ab]`; .* smaller `lam`"):
        owl_sparsities({"a": 0.0, "b": 0.1}, sizes, sparsity, lam)


def test_the_budget_is_rounded_by_largest_remainder():
    sizes = {name: LayerSize(10) for name in "abc"}
    budget = exact_budget({"a": 0.33, "b": 0.38, "c": 0.34}, sizes, 10.5 / 30)
    assert {name: int(share * 10) for name, share in budget.items()} == {"a": 3, "b": 4, "c": 3}


@pytest.mark.parametrize(
    ("keys", "name", "expected"),
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", "q_proj"),
        (["proj"], "model.layers.0.self_attn.q_proj", None),
        (["self_attn.*", "q_proj"], "layers.0.self_attn.q_proj", "self_attn.*"),
        (["q_proj", "layers.0.q_proj"], "layers.0.q_proj", "layers.0.q_proj"),
        ([r"layers\.(0|2)\..*"], "model.layers.1.fc", None),
        (["layers.1.fc"], "model.layers.11.fc", None),
        ([".*"], "anything", ".*"),
    ],
)
def test_keys_are_those_of_rank_pattern(keys, name, expected):
    assert matching_key(keys, name) == expected


def test_every_key_and_every_layer_is_used():
    names = ["h.0.a", "h.0.b", "h.1.a"]
    assert sparsities_by_name("s", {"h.0.a": 0.1, "a": 0.2, "b": 0.3}, names) == {
        "h.0.a": 0.1,
        "h.0.b": 0.3,
        "h.1.a": 0.2,
    }
    assert sparsities_by_name("s", {"b": 0.3}, names, default=0.5) == {"h.0.a": 0.5, "h.0.b": 0.3, "h.1.a": 0.5}
    with pytest.raises(ValueError, match=r"Every key of `s` .* got 'c' \(1 of 2 keys\), which name none; .*h.0.a"):
        sparsities_by_name("s", {"a": 0.2, "c": 0.2}, names, default=0.5)
    with pytest.raises(ValueError, match=r"`s` as a mapping .* got none for `h.0.b` \(1 of 3\); add a key"):
        sparsities_by_name("s", {"a": 0.2}, names)
