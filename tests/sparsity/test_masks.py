"""Laws of masks: exact counts whatever the ties, nested as sparsity grows, and a rounding that makes no new zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.sparsity import masks, round_keeping_support, select_mask, select_mask_in_graph

few_examples = settings(max_examples=60, deadline=None)

# Scores from a handful of values tie all the time; with NaN and infinities among them.
ties = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 2.0])
special = st.sampled_from([0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")])


@st.composite
def scores_in_groups(draw, values=ties):
    """(scores (rows, columns), group size, number to prune)."""
    rows, groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    numbers = draw(st.lists(values, min_size=rows * groups * size, max_size=rows * groups * size))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return torch.tensor(numbers, dtype=dtype).reshape(rows, groups * size), size, draw(st.integers(0, size))


def obvious_mask(scores: torch.Tensor, num_pruned: int, group_size: int) -> torch.Tensor:
    """A stable sort of every group; NaN last, as larger than any number."""
    order = scores.reshape(-1, group_size).double().argsort(dim=1, stable=True)[:, :num_pruned]
    return torch.ones(order.shape[0], group_size, dtype=torch.bool).scatter(1, order, False).reshape(scores.shape)


@few_examples
@given(scores_in_groups())
def test_exact_count_in_every_group_under_ties(case):
    scores, group_size, num_pruned = case
    mask = select_mask(scores, num_pruned, group_size)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert ((~mask).reshape(-1, group_size).sum(1) == num_pruned).all()


@few_examples
@given(scores_in_groups(values=special))
def test_equals_a_stable_sort_with_nan_as_the_largest(case):
    """So of equal scores those with the lower index go first."""
    scores, group_size, num_pruned = case
    expected = obvious_mask(scores, num_pruned, group_size)
    assert torch.equal(select_mask(scores, num_pruned, group_size), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_is_sorted_faster", lambda groups: True)
        assert torch.equal(select_mask(scores, num_pruned, group_size), expected)
    assert torch.equal(select_mask_in_graph(scores, torch.tensor(num_pruned), group_size), expected)


@few_examples
@given(scores_in_groups(), st.integers(0, 9))
def test_masks_are_nested(case, other):
    """What a lower sparsity prunes, a higher one prunes as well."""
    scores, group_size, num_pruned = case
    less, more = sorted((num_pruned, min(other, group_size)))
    assert not (select_mask(scores, more, group_size) & ~select_mask(scores, less, group_size)).any()


@few_examples
@given(scores_in_groups(), st.integers(1, 20))
def test_pieces_of_many_groups_are_selected_from_alike(case, at_once):
    scores, group_size, num_pruned = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "MAX_COMPARED", 0)
        patch.setattr(masks, "MAX_AT_ONCE", at_once)
        mask = select_mask(scores, num_pruned, group_size)
    assert torch.equal(mask, obvious_mask(scores, num_pruned, group_size))


def test_ties_go_by_index():
    mask = select_mask(torch.ones(2, 6), num_pruned=2, group_size=3)
    assert mask.tolist() == [[False, False, True] * 2] * 2


def test_bfloat16_scores_that_all_tie():
    scores = torch.full((64, 64), 0.1, dtype=torch.bfloat16)
    mask = select_mask(scores, num_pruned=3000, group_size=4096)
    assert int((~mask).sum()) == 3000 and not mask.flatten()[:3000].any()


def test_transposed_scores_are_grouped_as_they_are_seen():
    """GPT-2's weights are transposed views."""
    scores = torch.randn(8, 12)
    assert torch.equal(select_mask(scores.T, 2, 4), select_mask(scores.T.contiguous(), 2, 4))


def test_scores_are_left_alone_and_may_need_gradients():
    scores = torch.randn(4, 4, requires_grad=True)
    before = scores.detach().clone()
    assert not select_mask(scores, 2, 4).requires_grad
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize("num_pruned", [-1, 5])
def test_a_count_outside_of_the_group(num_pruned: int):
    with pytest.raises(ValueError, match=rf"\[0, group_size=4\], got {num_pruned}"):
        select_mask(torch.ones(2, 4), num_pruned, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_keeps_the_support(dtype):
    """From float64, where every one of these is a number, to a dtype in which some are not."""
    tiny = torch.tensor([1e-300, -1e-300, 1e-45, -1e-9, 3e-8, 0.0, 1.5, -2.0], dtype=torch.float64)
    support = tiny != 0
    rounded = round_keeping_support(tiny, support, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded != 0, support)
    assert torch.equal(rounded.sign()[support].double(), tiny.sign()[support])
    assert (rounded.double() - tiny).abs().max() <= max(torch.finfo(dtype).tiny, 1e-7)


def test_an_exact_cancellation_inside_the_support_is_no_zero():
    weight, support = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([True, False, True])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert (round_keeping_support(weight.to(dtype), support, dtype) != 0).tolist() == [True, False, True]


@few_examples
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30))
def test_rounding_is_the_plain_cast_elsewhere(numbers):
    weight = torch.tensor(numbers)
    cast = weight.to(torch.bfloat16)
    rounded = round_keeping_support(weight, weight != 0, torch.bfloat16)
    assert torch.equal(rounded[cast != 0], cast[cast != 0])
    assert torch.equal(rounded != 0, weight != 0)


STRIDE = masks._sample_stride(120_000)
LARGE = {
    "normal": lambda: torch.randn(400, 300),
    "many ties": lambda: torch.randint(0, 5, (400, 300)).float(),
    "all equal": lambda: torch.zeros(400, 300),
    "bfloat16": lambda: torch.randn(400, 300).bfloat16().float(),
    "rows and columns": lambda: torch.randn(400, 1) + torch.randn(1, 300),
    "sorted": lambda: torch.arange(120_000.0).reshape(400, 300),
    "heavy tails": lambda: torch.randn(400, 300).pow(9),
    "infinite": lambda: torch.where(torch.rand(400, 300) < 0.2, -torch.inf, torch.randn(400, 300)),
    "half NaN": lambda: torch.where(torch.arange(120_000) < 60_010, torch.arange(120_000.0), torch.nan),
    "a sample that misleads": lambda: torch.arange(120_000.0).remainder(STRIDE).reshape(400, 300),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.5, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("sorts", [False, True], ids=["as a CPU does", "as a GPU does"])
def test_large_groups_equal_sorting(make, share, sorts, monkeypatch):
    """Groups above the size of a sample are selected from by a bracket."""
    monkeypatch.setattr(masks, "_is_sorted_faster", lambda groups: sorts)
    scores = make()
    assert scores.numel() > masks.MAX_WHOLE
    num_pruned = int(share * scores.numel())
    expected = obvious_mask(scores, num_pruned, scores.numel())
    assert torch.equal(select_mask(scores, num_pruned, scores.numel()), expected)


@pytest.mark.parametrize("group_size", [2, 3, 4, 8, 9, 16, 50])
def test_small_groups_equal_sorting(group_size):
    """By rank up to MAX_COMPARED scores, by threshold above."""
    scores = torch.randint(0, 6, (14, group_size * 5)).float()
    for num_pruned in range(group_size + 1):
        expected = obvious_mask(scores, num_pruned, group_size)
        assert torch.equal(select_mask(scores, num_pruned, group_size), expected)


def test_an_unfair_sample_is_noticed():
    """Scores that the sample does not see at all: the bracket misses and the whole group is selected from."""
    scores = torch.full((120_000,), 1.0)
    scores[::STRIDE] = 2.0
    assert masks._select_by_bracket(scores, 30_000) is None
    assert torch.equal(select_mask(scores, 30_000, 120_000), obvious_mask(scores, 30_000, 120_000))
