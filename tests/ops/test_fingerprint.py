"""A fingerprint of a large tensor has to see a change in any column, also one that no counter tells of."""

import pytest
import torch

from peft_sparse.ops.fingerprint import COMPARED_ELEMENTS, Fingerprint


@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (1000, 300), (64, 4096), (384, 384)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_column_is_sampled(shape, transposed):
    """FSDP2 gathers into the same memory and keeps the version, so that the sample decides."""
    stored = torch.randn(shape)
    assert stored.numel() > COMPARED_ELEMENTS
    tensor = stored.T if transposed else stored
    kept = Fingerprint.of(tensor)
    assert kept.matches(tensor)
    columns = range(0, shape[1], 7) if shape[1] < 1000 else range(0, shape[1], 97)
    for column in columns:
        before = stored[:, column].clone()
        stored.data[:, column] += 1  # `.data`: the version stays
        assert tensor._version == kept.identity[-1] and not kept.matches(tensor), column
        stored.data[:, column] = before
    assert kept.matches(tensor)
