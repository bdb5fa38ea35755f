"""The non-zeros of a matrix as lists, by row and by column."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.sparsity import PackedWeight, csr_tensor, to_csr


@given(out=st.integers(1, 9), columns=st.integers(1, 9), zeros=st.floats(0, 1), seed=st.integers(0, 99))
def test_there_and_back(out, columns, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    weight[torch.rand(out, columns, generator=generator) < zeros] = 0
    csr = to_csr(weight)
    assert len(csr.values) == weight.count_nonzero()
    assert torch.equal(csr.with_values(csr.values).to_dense(), weight)
    assert torch.equal(csr.transposed_with_values(csr.values).to_dense(), weight.T)


def test_of_a_transposed_view():
    weight = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]]).T
    csr = to_csr(weight)
    assert csr.shape == (3, 2) and torch.equal(csr.values, torch.tensor([2.0, 1.0, 3.0]))
    assert {tensor.dtype for tensor in csr[:2] + csr[3:6]} == {torch.int32}


@pytest.mark.parametrize("at_once", [1, 64, 1 << 22])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_listed_by_row_for_a_forward(monkeypatch, at_once, zeros):
    monkeypatch.setattr("peft_sparse.sparsity.csr.LISTED_AT_ONCE", at_once)
    weight = torch.randn(9, 21).masked_fill_(torch.rand(9, 21) < zeros, 0)
    packed = PackedWeight.of(weight)
    for source in (weight, weight.T.contiguous().T, packed):
        csr = csr_tensor(source)
        assert torch.equal(csr.to_dense(), weight)
        assert csr.col_indices().dtype == csr.crow_indices().dtype == torch.int32
    if packed.values.numel():
        assert csr_tensor(packed).values().data_ptr() == packed.values.data_ptr()
