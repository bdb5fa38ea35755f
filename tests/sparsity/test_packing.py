"""Masks as bits and weights without zeros: packing and unpacking is the identity, and the layout is NumPy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.native import use_native
from peft_sparse.sparsity import (
    PackedWeight,
    dense_weight,
    pack_mask,
    unpack_mask,
    unpack_values,
    weight_entries,
    with_entries,
    write_rows,
)
from peft_sparse.sparsity.packing import _Places


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))
def test_round_trip_and_layout(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (columns + 7) // 8)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert torch.equal(unpack_mask(packed, columns, torch.float64), mask.double())


@pytest.mark.parametrize("columns", [8, 13])
def test_transposed_masks_and_parts(columns):
    mask = (torch.rand(columns, 16) < 0.5).T
    packed = pack_mask(mask)
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert torch.equal(unpack_mask(packed[3:7], columns), mask[3:7])


def sparse_weight(rows, columns, seed, zeros=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < zeros, 0)


@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_values_round_trip(rows, columns, seed, zeros, dtype):
    weight = sparse_weight(rows, columns, seed, zeros, dtype)
    packed = PackedWeight.of(weight)
    assert packed.shape == weight.shape and packed.dtype == dtype and packed.values.numel() == (weight != 0).sum()
    assert torch.equal(packed.dense(), weight)
    start, stop = sorted((seed % (rows + 1), seed // 7 % (rows + 1)))
    assert torch.equal(packed.rows(slice(start, stop)), weight[start:stop])
    counts = [int((row != 0).sum()) for row in weight]
    assert packed.starts.tolist() == np.concatenate([[0], np.cumsum(counts)]).tolist()
    out = torch.full_like(weight, 7)
    assert unpack_values(packed.values, packed.bitmask, columns, out) is out and torch.equal(out, weight)


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 10_000), st.integers(1, 200))
def test_unpacking_in_parts_is_the_same(rows, columns, seed, at_once):
    """Without the native kernels, which tests/native compares with this."""
    weight = sparse_weight(rows, columns, seed)
    packed = PackedWeight.of(weight)
    with pytest.MonkeyPatch.context() as patch, use_native(enabled=False):
        patch.setattr("peft_sparse.sparsity.packing.UNPACKED_AT_ONCE", at_once)
        assert torch.equal(packed.dense(), weight)


def test_a_weight_without_rows():
    packed = PackedWeight.of(torch.zeros(0, 12))
    assert torch.equal(packed.dense(), torch.zeros(0, 12))


@pytest.mark.parametrize("values", [2**31 - 1, 2**31 + 5])
def test_counts_beyond_int32(values):
    """Of the last of so many values that no memory here would hold them."""
    index_of = _Places(values, torch.device("cpu"))
    index_of.before = values - 2
    assert index_of(torch.tensor([[0b101]], dtype=torch.uint8)).tolist() == [[values - 1, 0, values, 0, 0, 0, 0, 0]]


def test_values_may_be_anything():
    """Not finite, or zero: a value is a value, and nothing of it reaches another place."""
    weight = torch.tensor([[0.0, float("nan"), 0.0, float("inf")], [0.0, -float("inf"), 1.0, 0.0]])
    packed = PackedWeight.of(weight)
    torch.testing.assert_close(packed.dense(), weight, equal_nan=True, rtol=0, atol=0)
    zeroed = packed._replace(values=torch.zeros_like(packed.values))
    assert torch.equal(zeroed.dense(), torch.zeros(2, 4))


def test_negative_zero_is_a_zero():
    packed = PackedWeight.of(torch.tensor([[-0.0, 2.0]]))
    assert packed.values.tolist() == [2.0] and not packed.dense().signbit().any()


def test_gradient_of_unpacking():
    packed = PackedWeight.of(sparse_weight(5, 11, 0, dtype=torch.float64))
    values = packed.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: unpack_values(v, packed.bitmask, 11), (values,))


def test_entries_of_either_form():
    weight = sparse_weight(6, 10, 0)
    for form in (weight, PackedWeight.of(weight)):
        doubled = with_entries(form, weight_entries(form) * 2)
        assert torch.equal(dense_weight(doubled), weight * 2)
        entries = torch.zeros_like(weight_entries(form))
        write_rows(entries, form, slice(2, 5), weight[2:5])
        expected = torch.zeros_like(weight)
        expected[2:5] = weight[2:5]
        assert torch.equal(dense_weight(with_entries(form, entries)), expected)
