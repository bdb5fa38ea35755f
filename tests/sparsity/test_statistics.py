"""Column norms: the same however the tokens come in batches, and padding is as if it were not there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.sparsity import ColumnNorms, Hessian


def norms_of(*batches: torch.Tensor, mask: torch.Tensor | None = None) -> ColumnNorms:
    norms = ColumnNorms(batches[0].shape[-1])
    for batch in batches:
        norms.update(batch, mask)
    return norms


def test_the_definition():
    x = torch.randn(3, 5, 4)
    expected = x.reshape(15, 4).double().norm(dim=0) / 3**0.5
    assert torch.allclose(norms_of(x).norms.double(), expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.data())
def test_splitting_a_batch_changes_nothing(sequences: int, data):
    x = torch.randn(sequences, 6, 5, generator=torch.Generator().manual_seed(sequences))
    cut = data.draw(st.integers(1, sequences - 1))
    whole, parts = norms_of(x), norms_of(x[:cut], x[cut:])
    assert torch.allclose(whole.norms, parts.norms, rtol=1e-5)
    assert (
        (whole.num_sequences, whole.num_tokens)
        == (parts.num_sequences, parts.num_tokens)
        == (sequences, 6 * sequences)
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([(2, 3), (7,), (0, 3), (0,), (2, 0)]), min_size=1, max_size=6))
def test_an_empty_batch_changes_nothing(shapes: list[tuple[int, ...]]):
    """Whether it comes first, last or between others."""
    batches = [torch.randn(*shape, 4) for shape in shapes]
    full = [batch for batch in batches if batch.numel()]
    (norms, hessian), (norms_expected, hessian_expected) = ((ColumnNorms(4), Hessian(4)) for _ in range(2))
    for batch in batches:
        norms.update(batch)
        hessian.update(batch)
    for batch in full:
        norms_expected.update(batch)
        hessian_expected.update(batch)
    assert torch.equal(norms.norms, norms_expected.norms)
    assert torch.equal(hessian.matrix, hessian_expected.matrix)
    assert (norms.num_sequences, norms.num_tokens) == (norms_expected.num_sequences, norms_expected.num_tokens)
    assert (hessian.num_sequences, hessian.num_tokens) == (norms.num_sequences, norms.num_tokens)


def test_padding_is_as_if_it_were_not_there():
    x, mask = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    junk = x.clone()
    junk[1, 3:] = float("nan")  # is not even looked at
    norms = norms_of(junk, mask=mask)
    expected = (x[0].square().sum(0) + x[1, :3].square().sum(0)).div(2).sqrt()
    assert torch.allclose(norms.norms, expected, rtol=1e-6)
    assert norms.num_tokens == 9


def test_a_mask_of_another_shape_is_ignored():
    x = torch.randn(2, 6, 4)
    assert torch.equal(norms_of(x, mask=torch.zeros(2, 5, dtype=torch.bool)).norms, norms_of(x).norms)


def test_flat_inputs_are_one_sequence():
    norms = norms_of(torch.ones(7, 4))
    assert (norms.num_sequences, norms.num_tokens) == (1, 7)
    assert torch.allclose(norms.norms, torch.full((4,), 7**0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """300^2 is beyond float16, and 1 is lost beside 256^2 in bfloat16."""
    x = torch.tensor([[[300.0], [1.0], [1.0]]], dtype=dtype)
    assert norms_of(x).norms.item() == pytest.approx((300.0**2 + 2) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_inputs_add_nothing(bad: float):
    norms = norms_of(torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        norms.update(torch.tensor([[[1.0, bad]]]))
    assert norms.norms.tolist() == pytest.approx([3**0.5, 3**0.5])
    assert (norms.num_sequences, norms.num_tokens) == (1, 3)


def test_nothing_seen():
    assert ColumnNorms(3).norms.tolist() == [0, 0, 0]


@pytest.mark.parametrize("width", [1, 5, 130, 700])
def test_hessian_is_the_mean_over_sequences(width: int):
    batches = [torch.randn(2, 9, width), torch.randn(3, 4, width), torch.randn(7, width)]  # 2, 3 and 1 sequences
    hessian = Hessian(width)
    for batch in batches:
        hessian.update(batch)
    x = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    torch.testing.assert_close(hessian.matrix.tril().double(), (2 / 6 * x.T @ x).tril(), rtol=1e-5, atol=1e-4)
    assert (hessian.num_sequences, hessian.num_tokens) == (6, 37)


def test_hessian_counts_what_the_mask_says_in_float32():
    x, mask = torch.randn(2, 3, 6, dtype=torch.bfloat16), torch.tensor([[True, True, False], [True, False, False]])
    hessian, expected = Hessian(6), Hessian(6)
    hessian.update(x, mask)
    expected.update(x[mask].float().reshape(1, 3, 6).expand(2, 3, 6) / 2**0.5)
    torch.testing.assert_close(hessian.matrix.tril(), expected.matrix.tril())
    assert hessian.matrix.dtype == torch.float32 and hessian.num_tokens == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_hessian_refuses_what_is_not_finite(bad: float):
    hessian = Hessian(4)
    x = torch.ones(1, 2, 4)
    x[0, 1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        hessian.update(x)
    hessian.update(x, torch.tensor([[True, False]]))
    assert hessian.num_tokens == 1 and hessian.matrix.isfinite().all()


def test_a_copy_of_a_hessian_lives_on_its_own():
    hessian = Hessian(4)
    hessian.update(torch.ones(1, 2, 4))
    copied = hessian.copy()
    copied.update(torch.ones(1, 2, 4))
    assert (hessian.num_tokens, copied.num_tokens) == (2, 4)
    assert torch.equal(hessian.matrix.tril(), torch.full((4, 4), 4.0).tril())
