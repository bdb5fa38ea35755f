"""Masks as bits: packing and unpacking is the identity, and the layout is NumPy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.sparsity import pack_mask, unpack_mask


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
