"""One Hessian for linears with the same inputs: what each one counts is what it alone would have counted."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_sparse.pruning.sharing import SharedHessians
from peft_sparse.sparsity import Hessian

WIDTH = 5


def members(count: int = 3) -> list:
    shared = SharedHessians()
    return [shared.new_statistics(nn.Linear(WIDTH, 2)) for _ in range(count)]


def lower(hessian: Hessian) -> torch.Tensor:
    return hessian.matrix.tril()


@given(
    plan=st.lists(st.lists(st.integers(-1, 3), min_size=4, max_size=4), min_size=1, max_size=6), in_turn=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_everyone_counts_its_own_inputs(plan, in_turn):
    """In each round every linear gets one of three tensors, an empty one, or none; some come late, after others' next
    input."""
    linears, own = members(4), [Hessian(WIDTH) for _ in range(4)]
    rounds = [[*torch.randn(3, 1, 3, WIDTH), torch.empty(0, 3, WIDTH)] for _ in plan]
    calls = [(r, i) for r in range(len(plan)) for i in range(4)]
    if not in_turn:
        calls.sort(key=lambda call: (call[1], call[0]))
    for r, i in calls:
        if plan[r][i] >= 0:
            linears[i].update(rounds[r][plan[r][i]])
            own[i].update(rounds[r][plan[r][i]])
    for linear, alone in zip(linears, own, strict=True):
        assert linear.num_tokens == alone.num_tokens
        if alone.num_tokens:
            torch.testing.assert_close(lower(linear.hessian), lower(alone), rtol=1e-4, atol=1e-5)
            assert linear.hessian.num_sequences == alone.num_sequences


def test_same_inputs_are_counted_once(monkeypatch):
    added = []
    add = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, *rest: (added.append(self), add(self, *rest))[1])
    linears = members()
    for x in torch.randn(4, 2, 3, WIDTH):
        for linear in linears:
            linear.update(x)
    assert len({id(linear.hessian) for linear in linears}) == 1 and len(added) == 4
    expected = Hessian(WIDTH)
    assert linears[0].hessian.num_tokens == linears[2].num_tokens == 24 and expected.num_tokens == 0


def test_another_view_of_the_same_tensor_is_the_same():
    first, second, third = members()
    x = torch.randn(6, WIDTH)
    first.update(x.reshape(2, 3, WIDTH))
    second.update(x.reshape(2, 3, WIDTH))
    third.update(x)  # one sequence and not two
    assert first.hessian is second.hessian is not third.hessian


def test_equal_numbers_elsewhere_are_not_the_same():
    first, second, _ = members()
    x = torch.randn(1, 3, WIDTH)
    first.update(x)
    second.update(x.clone())
    assert first.hessian is not second.hessian


def test_a_tensor_that_was_changed_in_place_is_another_input():
    first, second, _ = members()
    x = torch.randn(2, 3, WIDTH)
    for linear in (first, second):
        linear.update(x)
    before = x.clone()
    first.update(x)
    x.add_(1)
    second.update(x)
    expected, other = Hessian(WIDTH), Hessian(WIDTH)
    for hessian, last in ((expected, before), (other, x)):
        hessian.update(before)
        hessian.update(last)
    torch.testing.assert_close(lower(first.hessian), lower(expected))
    torch.testing.assert_close(lower(second.hessian), lower(other))


def test_other_masks_are_other_inputs():
    first, second, third = members()
    x, mask = torch.randn(2, 3, WIDTH), torch.tensor([[True, True, False], [True, False, False]])
    first.update(x, mask)
    second.update(x, mask.clone())
    third.update(x)
    assert first.hessian is second.hessian is not third.hessian
    assert (first.num_tokens, third.num_tokens) == (3, 6)


def test_inference_tensors_are_counted_without_sharing():
    first, second, _ = members()
    with torch.inference_mode():
        x = torch.randn(1, 3, WIDTH)
        for linear in (first, second, first, second):
            linear.update(x)
    assert first.hessian is not second.hessian
    torch.testing.assert_close(lower(first.hessian), lower(second.hessian))


def test_nothing_is_counted_of_a_batch_with_nan():
    first, second, _ = members()
    x, bad = torch.randn(1, 3, WIDTH), torch.full((1, 3, WIDTH), torch.nan)
    for linear in (first, second):
        linear.update(x)
        with pytest.raises(ValueError, match="NaN or infinity"):
            linear.update(bad)
    assert first.num_tokens == second.num_tokens == first.hessian.num_tokens == 3


def test_memory_is_free_when_all_have_let_go():
    first, second, third = members()
    x = torch.randn(1, 3, WIDTH)
    for linear in (first, second, third):
        linear.update(x)
    kept, tensor = weakref.ref(first.hessian), weakref.ref(x)
    del x
    first.release()
    second.release()
    gc.collect()
    assert kept() is third.hessian
    third.release()
    gc.collect()
    assert kept() is None and tensor() is None
    with pytest.raises(ValueError, match="needs inputs, got none"):
        _ = first.hessian
