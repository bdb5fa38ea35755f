"""Reading and writing the weight of a linear module as (out, in), whichever way it is stored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from peft_sparse.linears.hooks import weights_loaded
from peft_sparse.linears.packed import PackedLinear
from peft_sparse.linears.quantized import bits, is_foreign, quantized_weight, write_quantized
from peft_sparse.linears.sharded import is_share, whole_shape
from peft_sparse.sparsity import (
    EightBitWeight,
    FourBitWeight,
    PackedWeight,
    Weight,
    dense_weight,
    pack_values,
    quantize_like,
    unpack_mask,
)


def unwrap(module: nn.Module) -> nn.Module:
    """The module below any PEFT tuner layers that wrap it."""
    while isinstance(base_layer := getattr(module, "base_layer", None), nn.Module):
        module = base_layer
    return module


def plain_class(linear: nn.Module) -> type[nn.Module]:
    """The class of a linear without its acceleration."""
    return getattr(type(linear), "plain_linear_class", type(linear))


def forward_replaced(module: nn.Module) -> bool:
    """Whether a module has another forward than its class, as offloading gives it. A hook of accelerate that was
    removed leaves the class's own on the module."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


# What `computes_linear` found, as long as the modules live, and the rows and columns that it tries at most.
_COMPUTES_LINEAR: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TRIED = 64


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T + b from a weight that this package reads: nn.Linear and transformers' Conv1D
    with a floating point weight, PackedLinear, and what bitsandbytes has quantised.

    The output projection inside nn.MultiheadAttention is not one: its weight is used without calling it. Nor is a
    subclass whose forward computes something else, such as the routers of some experts.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, PackedLinear) or bits(module) is not None:
        return True
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point() or is_foreign(module):
        return False
    return plain_class(module).forward in (nn.Linear.forward, Conv1D.forward) or computes_linear(module)


@torch.no_grad()
def computes_linear(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear or Conv1D with a forward of its own computes x W^T + b: it is tried once.

    It is tried with small numbers in the place of its own, so that the answer is the same wherever they are: on the
    meta device, offloaded or sharded.
    """
    if module not in _COMPUTES_LINEAR:
        rows, columns = (min(size, _TRIED) for size in whole_shape(weight_parameter(module)))
        cpu: Any = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults are
        weight = torch.linspace(-1, 1, rows * columns, **cpu).view(rows, columns)
        matrix = weight.T if isinstance(module, Conv1D) else weight  # (out, in)
        bias = None if getattr(module, "bias", None) is None else torch.ones(len(matrix), **cpu)
        x = torch.linspace(-1, 1, 2 * matrix.shape[1], **cpu).view(2, matrix.shape[1])
        try:
            found, expected = _small_forward(module, weight, bias)(x), nn.functional.linear(x, matrix, bias)
            same = found.shape == expected.shape and torch.allclose(found, expected, 1e-3, 1e-3)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # other inputs, or other outputs
            same = False
        _COMPUTES_LINEAR[module] = same
    return _COMPUTES_LINEAR[module]


def _small_forward(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., Any]:
    """The forward of the module's class, without hooks, with the module's settings but another weight."""
    cls: Any = type(module)
    small = cls.__new__(cls)
    sizes = ("nx", "nf") if isinstance(module, Conv1D) else ("out_features", "in_features")
    own = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    small.__dict__ |= module.__dict__ | {"_parameters": own} | dict(zip(sizes, weight.shape, strict=True))
    return partial(cls.forward, small)


def check_own_weight(name: str, module: nn.Module) -> None:
    """Raises:
    ValueError: if a linear's weight is computed anew at each forward, so that what is written into it would be lost.
        Not for within a forward of FSDP1, where no weight is a parameter."""
    if isinstance(module, PackedLinear) or "weight" in module._parameters:
        return
    way_out = "undo what computes it"
    if is_parametrized(module, "weight"):
        way_out = 'call `torch.nn.utils.parametrize.remove_parametrizations(module, "weight")` on it'
    elif "weight_mask" in module._buffers:
        way_out = 'call `torch.nn.utils.prune.remove(module, "weight")` on it, which keeps its zeros'
    raise ValueError(
        f"A linear's weight is a parameter of its own, got `{name}`, which computes it from other tensors at each "
        f"forward, as torch.nn.utils.prune and parametrizations do; {way_out} first."
    )


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear module."""
    if isinstance(module, PackedLinear) or bits(module) is not None:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type] # a quantised weight is flat
    rows, columns = whole_shape(weight_parameter(module))
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def weight_parameter(module: nn.Module) -> nn.Parameter:
    """The parameter with the entries of a linear's weight: `weight` (codes, where it is quantised), or the values of a
    PackedLinear.

    Of a sharded model this may be a share, and within a forward of FSDP1 a tensor that is no parameter.
    """
    linear: Any = module
    return linear.values if isinstance(module, PackedLinear) else linear.weight


def stored_weight(module: nn.Module) -> Weight:
    """The weight of a linear, (out, in), without a copy: a PackedWeight of a PackedLinear, a QuantizedWeight of a
    quantised one, else as [`get_weight`]."""
    if bits(module) is not None:
        return quantized_weight(module)
    return module.packed_weight if isinstance(module, PackedLinear) else get_weight(module)


def get_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in): the parameter itself or its transposed view, so gradients and writes reach it.

    That of a PackedLinear or a quantised linear is a new tensor, unpacked for this call: to read, while [`set_weight`]
    writes.

    Raises:
        RuntimeError: if this process has only a share of it.
    """
    if isinstance(module, PackedLinear):
        return module.dense_weight()
    if bits(module) is not None:
        return quantized_weight(module).dense()
    weight = weight_parameter(module)
    if is_share(weight):
        raise RuntimeError(
            f"A weight is read when it is whole, got this process's share of a {tuple(whole_shape(weight))} weight "
            "(FSDP2 or ZeRO-3); read it inside `peft_sparse.linears.gathered(module)`, in all processes at once."
        )
    return as_stored(module, weight)


def writable(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which a linear's weight is written in place: of one that was made in inference mode, that mode."""
    return torch.inference_mode() if weight_parameter(module).is_inference() else nullcontext()


def as_stored(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """From (out, in) to the orientation in which the module stores its weight, and back."""
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def set_weight(module: nn.Module, weight: Weight) -> None:
    """Overwrite the module's weight in place with `weight`, (out, in) of any dtype; a quantised one is quantised anew
    unless `weight` is.

    Raises:
        ValueError: for a PackedLinear, if `weight` has entries where it has none. Nothing is written then.
    """
    if bits(module) is not None:
        if not isinstance(weight, (FourBitWeight, EightBitWeight)):
            weight = quantize_like(quantized_weight(module), dense_weight(weight))
        write_quantized(module, weight)
        return
    if not isinstance(module, PackedLinear):
        with writable(module):
            get_weight(module).copy_(dense_weight(weight))
        return
    if isinstance(weight, PackedWeight) and torch.equal(weight.bitmask, module.bitmask):
        module.values.copy_(weight.values)
        return
    dense = dense_weight(weight)
    if dense.shape != (module.out_features, module.in_features):
        raise ValueError(
            f"A weight keeps its shape, here {(module.out_features, module.in_features)}, got {tuple(dense.shape)}."
        )
    if outside := int((dense.masked_fill(unpack_mask(module.bitmask, module.in_features), 0) != 0).sum()):
        raise ValueError(
            f"The places of a packed weight are fixed, got {outside} entries that are not zero outside of them; make "
            "a new one with `PackedLinear.from_linear`."
        )
    module.values.copy_(pack_values(dense, module.bitmask))


def num_zeros(module: nn.Module) -> int:
    """How many entries of a linear's weight are zero. Nothing is unpacked for it, but a block of a quantised one."""
    in_features, out_features = in_out_features(module)
    if bits(module) is not None:
        weight, step = quantized_weight(module), max(1, (1 << 21) // in_features)
        blocks = (slice(start, min(start + step, out_features)) for start in range(0, out_features, step))
        return sum(int((weight.rows(rows) == 0).sum()) for rows in blocks)
    with weights_loaded(module):
        return in_features * out_features - int(torch.count_nonzero(weight_parameter(module)))
