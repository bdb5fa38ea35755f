"""The weight that a linear computes with, whatever adapters PEFT has put around it."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.linears import as_stored, bits, stored_weight, unwrap, weights_loaded
from peft_sparse.sparsity import dense_weight
from peft_sparse.tuners.sparse_layer import SparseLayer


@torch.no_grad()
def forward_weight(linear: nn.Module) -> torch.Tensor:
    """The weight that the forward of a linear uses, (out, in): with unmerged adapters their effect is included, unless
    they are disabled. Of a sharded model it is gathered, in all processes at once."""
    here = linear.weights_loaded() if isinstance(linear, SparseLayer) else weights_loaded(*linear.modules())
    with here as was_sharded:
        weight = _weight_with_adapters(linear)
        return weight.clone() if was_sharded else weight


def _weight_with_adapters(linear: nn.Module) -> torch.Tensor:
    weight = stored_weight(unwrap(linear))
    if not isinstance(linear, BaseTunerLayer) or linear.merged or linear.disable_adapters:
        return dense_weight(weight)
    names = [name for name in linear.active_adapters if name in linear._get_available_adapters()]
    if not isinstance(linear, SparseLayer) and bits(unwrap(linear)) is None:
        return _merged_by_peft(linear) if names else dense_weight(weight)
    for name in names:
        if isinstance(linear, SparseLayer):
            weight = linear.effective_weight(name, weight)
        elif hasattr(linear, "get_delta_weight"):
            delta = as_stored(unwrap(linear), linear.get_delta_weight(name))  # back to (out, in)
            weight = dense_weight(weight) + delta
    return dense_weight(weight)


def _merged_by_peft(layer: Any) -> torch.Tensor:
    """What another method's layer would merge its active adapters to. Only the method knows: what it calls a delta
    weight is added by LoRA, multiplied by HiRA and OFT, and two tensors of BOFT.

    Merged is a copy that has the factors in common with the layer, and a base layer of its own.
    """
    own, base = _shallow(layer), _shallow(unwrap(layer))
    base._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, parameter in base._parameters.items()
    }
    own._modules["base_layer"] = base
    if any(parameter.is_meta for parameter in layer.parameters()):  # to add those would do nothing
        return dense_weight(stored_weight(base)).to("meta")
    with suppress(NotImplementedError):  # of a method without merging
        own.merge()
    return dense_weight(stored_weight(base))


def _shallow(module: Any) -> Any:
    """A module with the same contents, in containers of its own."""
    found = copy.copy(module)
    found.__dict__ = {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in module.__dict__.items()
    }
    return found
