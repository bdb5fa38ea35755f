"""Reading and writing the weight of a linear module as (out, in), whichever way it is stored."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def unwrap(module: nn.Module) -> nn.Module:
    """The module below any PEFT tuner layers that wrap it."""
    while isinstance(base_layer := getattr(module, "base_layer", None), nn.Module):
        module = base_layer
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T + b from a floating point weight: nn.Linear and transformers' Conv1D.

    The output projection inside nn.MultiheadAttention is not one: its weight is used without calling it.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point()


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear module."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def get_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in): the parameter itself or its transposed view, so gradients and writes reach it."""
    return as_stored(module, module.get_parameter("weight"))


def as_stored(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """From (out, in) to the orientation in which the module stores its weight, and back."""
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Overwrite the module's weight in place with `weight`, (out, in) of any dtype."""
    module.get_parameter("weight").copy_(as_stored(module, weight))
