"""Patterns: what they parse, how many weights they prune, and that what they prune is found again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.sparsity import NM, Unstructured, check_sparsity, find_pattern, parse_pattern, select_mask

few_examples = settings(max_examples=60, deadline=None)


def masked(pattern, sparsity=None, shape=(6, 24)) -> torch.Tensor:
    """A random weight pruned to the pattern."""
    weight = torch.randn(*shape)
    size = pattern.group_size(shape)
    return weight * select_mask(weight.abs(), pattern.num_pruned(pattern.resolve_sparsity(sparsity, 0.5), size), size)


@pytest.mark.parametrize(
    ("text", "expected"), [("unstructured", Unstructured()), ("2:4", NM(2, 4)), ("1:16", NM(1, 16))]
)
def test_parse(text: str, expected):
    assert parse_pattern(text) == expected
    assert str(expected) == text
    assert parse_pattern(expected) is expected


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "4:4", "a:b", "2:4 ", "-2:4", "2:4:8", "", "structured", None, 0.5, (2, 4)]
)
def test_malformed(text):
    with pytest.raises(ValueError, match=r"N:M.*got"):
        parse_pattern(text)


def test_the_group_of_an_unstructured_pattern():
    assert parse_pattern("unstructured", group="row").group_size((3, 5)) == 5
    assert parse_pattern("unstructured").group_size((3, 5)) == 15
    assert parse_pattern("2:4", group="row").group_size((3, 8)) == 4


@few_examples
@given(st.integers(1, 32), st.data())
def test_n_m_prunes_exactly_m_minus_n(n: int, data):
    """Also where 1 - N/M is no binary fraction: (1 - 1/3) * 3 is not quite 2."""
    m = data.draw(st.integers(n + 1, 64))
    pattern = NM(n, m)
    assert pattern.num_pruned(pattern.resolve_sparsity(None), m) == m - n


@few_examples
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10_000))
def test_counts_are_below_the_group_and_grow(sparsity: float, size: int):
    pattern = Unstructured()
    count = pattern.num_pruned(sparsity, size)
    assert count == int(sparsity * size)
    assert 0 <= count <= size
    assert pattern.num_pruned(sparsity / 2, size) <= count


@pytest.mark.parametrize("sparsity", [1, 1.0, 1.5, -0.1, float("nan"), "0.5", None, True])
def test_sparsity_is_checked(sparsity):
    with pytest.raises(ValueError, match=r"`target` is the share of zeros and lies in \[0, 1\)"):
        check_sparsity("target", sparsity)


def test_resolving_the_sparsity():
    assert Unstructured().resolve_sparsity(None, 0.9) == 0.9
    assert Unstructured().resolve_sparsity(0, 0.9) == 0.0
    assert NM(2, 8).resolve_sparsity(None, 0.9) == 0.75
    assert NM(1, 3).resolve_sparsity(0.6666667) == 1 - 1 / 3
    with pytest.raises(ValueError, match=r"2:8 fixes the sparsity at 0.75, got sparsity=0.5"):
        NM(2, 8).resolve_sparsity(0.5)


def test_width():
    NM(2, 4).check_width(8, "up")
    Unstructured().check_width(7, "up")
    with pytest.raises(ValueError, match=r"divisible by 4, got 1022 in `mlp.up`; exclude it with `exclude_modules`"):
        NM(2, 4).check_width(1022, "mlp.up")


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8", "4:8", "1:2", "3:4", "1:8", "5:8", "8:16", "1:32", "16:32"])
def test_a_pattern_is_found_again(text: str):
    weight = masked(parse_pattern(text), shape=(64, 64))
    assert find_pattern(weight) == text
    weight[3, :] = 1.0  # one dense row
    assert find_pattern(weight) == "unstructured"


def test_a_pattern_with_further_zeros():
    """Of the patterns in wide use alone, and where chance would not do: with enough zeros any weight follows some."""
    for text, found in (("2:4", "2:4"), ("8:16", "unstructured")):
        weight = masked(parse_pattern(text), shape=(64, 64))
        weight[::2, :8] = 0.0
        assert find_pattern(weight) == found
    for sparsity in (0.9, 0.97, 0.99, 0.999):
        assert find_pattern(masked(Unstructured(), sparsity, shape=(512, 512))) == "unstructured"
    weight = masked(NM(2, 4), shape=(512, 512))
    assert find_pattern(weight * (torch.rand(512, 512) < 0.5)) == "2:4"
    assert find_pattern(masked(Unstructured("row"), 0.5, shape=(64, 32))) == "unstructured"  # not 16:32


def test_what_find_pattern_calls_the_rest():
    assert find_pattern(torch.ones(4, 8)) == "dense"
    assert find_pattern(masked(Unstructured(), 0.5, shape=(32, 32))) == "unstructured"
    assert find_pattern(masked(Unstructured("row"), 0.5, shape=(32, 7))) == "unstructured"  # no multiple of 4
    nearly_dense = torch.ones(100, 8)
    nearly_dense[0, :4] = 0
    assert find_pattern(nearly_dense) == "dense"
    assert find_pattern(torch.ones(0, 8)) == find_pattern(torch.ones(4, 0)) == "dense"
    assert find_pattern(torch.zeros(4, 8)) == "unstructured"  # satisfies all of them


@few_examples
@given(st.sampled_from(["2:4", "1:4", "3:4", "2:8"]), st.integers(1, 5), st.integers(1, 4))
def test_n_m_in_every_group(text: str, rows: int, groups: int):
    pattern = parse_pattern(text)
    weight = masked(pattern, shape=(rows, groups * pattern.m))
    assert ((weight != 0).reshape(-1, pattern.m).sum(1) == pattern.n).all()
