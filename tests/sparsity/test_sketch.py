"""The sketch of a layer's inputs: exact for few tokens, near for many."""

import pytest
import torch

from peft_sparse.sparsity import OutputSketch


def exact(x, weight, pruned) -> float:
    return float((x @ (pruned - weight).T).norm() / (x @ weight.T).norm())


def pruned_half(weight):
    return weight.where(weight.abs() > weight.abs().median(), torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_while_every_token_has_a_row(dtype):
    x, weight = torch.randn(3, 100, 24).to(dtype), torch.randn(16, 24)
    sketch = OutputSketch(24)
    for sequence in x:
        sketch.update(sequence[None])
    expected = exact(x.float().reshape(-1, 24), weight, pruned_half(weight))
    assert sketch.num_tokens == 300
    assert sketch.relative_error(weight, pruned_half(weight)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [7, 512, 700])
def test_near_for_many_tokens_with_outliers(length):
    """One token in 500 is a hundred times larger, as in language models."""
    x, weight = torch.randn(20 * 700, 48) @ torch.randn(48, 48), torch.randn(64, 48)
    x[::500] *= 100
    sketch = OutputSketch(48)
    for batch in x.split(length):
        sketch.update(batch[None])
    expected = exact(x, weight, pruned_half(weight))
    assert sketch.relative_error(weight, pruned_half(weight)) == pytest.approx(expected, rel=0.03)


def test_padding_does_not_count():
    x, weight, mask = torch.randn(2, 5, 8), torch.randn(4, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    sketch = OutputSketch(8)
    sketch.update(x, mask)
    assert sketch.num_tokens == 6
    expected = exact(x[mask], weight, pruned_half(weight))
    assert sketch.relative_error(weight, pruned_half(weight)) == pytest.approx(expected, rel=1e-5)


def test_outputs_that_are_zero():
    sketch = OutputSketch(8)
    sketch.update(torch.zeros(2, 3, 8))
    assert sketch.relative_error(torch.ones(4, 8), torch.zeros(4, 8)) == 0.0


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    OutputSketch(8).update(torch.ones(2, 3, 8))
    assert torch.equal(torch.get_rng_state(), before)
