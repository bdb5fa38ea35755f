"""Whether a tensor is still what something was computed from, decided by content as far as that is cheap.

Neither object identity nor version counters tell everything: an in-place change through `.data` does not count as a
version, and sharded training recreates parameters at every forward. So small tensors are compared as a whole with a
kept copy; tensors of the weight's size by identity, version and a sample.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

# Tensors up to the first size are compared as a whole, larger ones by a sample of about the second.
COMPARED_ELEMENTS = 1 << 16
SAMPLED_ELEMENTS = 1 << 12


class Fingerprint(NamedTuple):
    """What is remembered of a tensor: shape, dtype, device, of a large one also address and version; and content."""

    identity: tuple[Any, ...]
    content: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Fingerprint:
        """Remember a tensor as it is now."""
        return cls(_identity(tensor), _sample(tensor).clone())

    def matches(self, tensor: torch.Tensor) -> bool:
        """Whether this is the tensor that was remembered, unchanged."""
        return _identity(tensor) == self.identity and torch.equal(_sample(tensor), self.content)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells a large tensor from another or a later one; of a small one, whose content tells, the kind alone."""
    kind = (tensor.shape, tensor.dtype, tensor.device)
    if tensor.numel() <= COMPARED_ELEMENTS:
        return kind
    return (*kind, tensor.data_ptr(), None if tensor.is_inference() else tensor._version)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() <= COMPARED_ELEMENTS:
        return tensor
    rows_first = tensor if tensor.is_contiguous() else tensor.T  # as stored: a view, no copy
    stride = tensor.numel() // SAMPLED_ELEMENTS
    while math.gcd(stride, rows_first.shape[-1]) > 1:
        stride += 1  # else it would meet few columns, and a column whose input is never used never changes
    return rows_first.reshape(-1)[::stride]
