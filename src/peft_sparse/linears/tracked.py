"""Whether a weight is still the one that something was made from, looked at in every forward of a fast layer.

Address and version tell most of it, and on a CPU a sample of `SAMPLED` entries the rest: a change through `.data`, as
in PEFT's merging, counts as no version. Training steps ask the same, and have time for larger samples
(`ops/fingerprint.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
SAMPLED, KEPT = 16, 12  # entries, and those of them that are not zero, if there are so many
LOOKED_THROUGH = 4096  # entries among which they are chosen


class TrackedTensor:
    """What is remembered of a tensor, to tell whether it is still the same.

    Args:
        sampled: whether its content is looked at as well.
    """

    def __init__(self, tensor: torch.Tensor, sampled: bool) -> None:
        self.alias = tensor.detach()  # keeps the memory, so that its address is not given to another tensor
        self.address, self.version, self.contiguous = tensor.data_ptr(), _version(tensor), tensor.is_contiguous()
        self.dtype, self.rows = tensor.dtype, tensor.shape[0]
        self.entries: Callable[[], Any] | None = None
        if sampled and tensor.device.type == "cpu" and tensor.numel():
            self.entries = _reader(self.alias)
            self.content = self.entries()

    def matches(self, tensor: torch.Tensor | None) -> bool:
        """Whether this is the tensor that was remembered, as it was."""
        if tensor is None or tensor.data_ptr() != self.address or _version(tensor) != self.version:
            return False
        if tensor.dtype != self.dtype or tensor.is_contiguous() != self.contiguous or tensor.size(0) != self.rows:
            return False
        return self.entries is None or self.entries() == self.content


def _reader(weight: torch.Tensor) -> Callable[[], tuple[int, ...]]:
    """A function that reads the bits of a sample of the entries. A gather and a comparison by torch would take several
    times as long: a tenth of a layer's time, where the layer before has emptied the caches."""
    bits: Any = weight.view(_INTEGERS[weight.element_size()]).numpy()
    return partial(itemgetter(*_sample(weight)), memoryview(bits))


def _sample(weight: torch.Tensor) -> list[tuple[int, int]]:
    """Up to `SAMPLED` places, most of them not zero as far as there are so many: what is zero may stay so."""
    columns = weight.shape[1]
    spread = torch.arange(0, weight.numel(), max(1, weight.numel() // LOOKED_THROUGH), device=weight.device)
    zero = weight[spread // columns, spread % columns] == 0
    kept, zeros = spread[~zero].tolist(), spread[zero].tolist()
    places = kept[:: max(1, len(kept) // KEPT)][:KEPT] + zeros[:: max(1, len(zeros) // KEPT)][: SAMPLED - KEPT]
    return [divmod(place, columns) for place in places]


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
