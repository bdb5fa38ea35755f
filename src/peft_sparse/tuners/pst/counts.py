"""Where a PST layer keeps how many weights it prunes: plain numbers, which stay whole when the weights are sharded.

accelerate's `fsdp_cpu_ram_efficient_loading` moves a model to the meta device, shards it there, and fills it with what
the first process sends, which it can for sharded tensors only: any persistent buffer stops it. The counts are the same
in all processes, so they stay where they are, and are no part of what is asked for at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict


class PrunedCounts(BufferDict):
    """Counts by adapter name, int64 scalars, saved with the layer.

    Attributes:
        withheld: whether the layer's weight is a share on the meta device, so that its state is asked for only in
            order to be filled.
    """

    def __init__(self) -> None:
        super().__init__({}, persistent=True)
        self.withheld = False

    def __setitem__(self, name: str, count: torch.Tensor) -> None:
        if not (count.is_meta and name in self):  # PEFT moves it to where a weight on disk is said to be
            super().__setitem__(name, count)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PrunedCounts:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, count in self._buffers.items():
            if count is not None and count.is_meta:
                self._buffers[name] = before[name]  # a number that is forgotten cannot be sent by anyone
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.withheld:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.withheld:
            del missing_keys[known:]
            self.withheld = False
