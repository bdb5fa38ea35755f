"""What calibration gathers about the inputs of one linear, by whichever pruner."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from peft_sparse.linears import get_weight, in_out_features
from peft_sparse.sparsity import ColumnNorms


class Statistics(Protocol):
    """What a pruner gathers about the inputs of one linear, such as [`ColumnNorms`]."""

    num_tokens: int

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Take in the inputs (sequences, tokens, in) of one batch; ValueError if they hold NaN or infinity."""


def empty_norms(linear: nn.Module) -> ColumnNorms:
    """The statistics of Wanda, RIA and OWL, which live where the linear's weight is."""
    return ColumnNorms(in_out_features(linear)[0], get_weight(linear).device)
