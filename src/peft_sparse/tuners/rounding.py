"""What is lost when merged weights go back into a quantised base model, added up over its layers."""

from __future__ import annotations

import math
import warnings

import torch


class RoundingErrors:
    """||W_kept - W|| / ||W|| and max |W_kept - W| of merged weights W, of each layer and of all together."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}  # relative error by layer
        self.largest = 0.0
        self._squares, self._norm = 0.0, 0.0

    def add(self, name: str, merged: torch.Tensor, kept: torch.Tensor) -> None:
        """Count one layer.

        Args:
            merged: (out, in), as the adapters make it.
            kept: (out, in), as it is stored.
        """
        difference = kept.to(merged.dtype) - merged
        squares, norm = float(difference.square().sum()), float(merged.square().sum())
        self._squares, self._norm = self._squares + squares, self._norm + norm
        self.largest = max(self.largest, float(difference.abs().max()))
        self.worst[name] = math.sqrt(squares / norm) if norm else 0.0

    @property
    def relative(self) -> float:
        """||W_kept - W|| / ||W|| over all layers."""
        return math.sqrt(self._squares / self._norm) if self._norm else 0.0

    def warn(self, dtype: torch.dtype | None) -> None:
        """State the error.

        Args:
            dtype: of dense weights; None: they were quantised again.
        """
        name = max(self.worst, key=lambda name: self.worst[name])
        layers, outputs = f"{len(self.worst)} quantised layers", "so that outputs may differ"
        how = f"quantises {layers} again" if dtype is None else f"rounds {layers} to {dtype}"
        way_out = "; `merge_and_unload(dequantize_to=torch.bfloat16)` loses less" if dtype is None else ""
        warnings.warn(
            f"Merging {how}, {outputs}: relative error of the weights {self.relative:.2%} (worst layer `{name}`: "
            f"{self.worst[name]:.2%}), largest error of one weight {self.largest:.2g}. No zero moves{way_out}.",
            stacklevel=4,
        )
