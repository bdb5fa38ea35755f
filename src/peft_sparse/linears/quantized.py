"""Linears that bitsandbytes has quantised: Linear4bit (NF4, FP4; QLoRA, arXiv 2305.14314) and Linear8bitLt
(LLM.int8(), arXiv 2208.07339). This is the one file that knows how their modules hold codes and scales.

bitsandbytes need not be installed, and is not imported unless something is to be quantised: a model that has such
modules has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from peft_sparse.sparsity import EightBitWeight, FourBitWeight, QuantizedWeight


def bits(module: nn.Module) -> int | None:
    """4 or 8 for a quantised linear of bitsandbytes, None for all else.

    A Linear8bitLt that keeps its weight in 16 bits, to be trained, and quantises it in each forward, is none.
    """
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    linears = getattr(bitsandbytes, "nn", None)
    if linears is None:
        return None
    if isinstance(module, linears.Linear4bit):
        return 4
    return 8 if isinstance(module, linears.Linear8bitLt) and not module.state.has_fp16_weights else None


def is_foreign(module: nn.Module) -> bool:
    """Whether the weight of an nn.Linear is quantised in a way that this package does not read."""
    weight: Any = module._parameters.get("weight")
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    linears = getattr(bitsandbytes, "nn", None)
    if linears is not None and isinstance(module, (linears.Linear4bit, linears.Linear8bitLt)):
        return bits(module) is None
    if weight is None:
        return False
    small = weight.is_floating_point() and weight.element_size() < 2  # float8, with a scale elsewhere
    return small or type(weight).__module__.split(".")[0] in ("torchao", "optimum")


def not_read(model: nn.Module) -> str:
    """For the end of messages: which linears of a model are quantised in a way that this package does not read; empty
    if there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_foreign(m)}
    if not found:
        return ""
    first, linear = next(iter(found.items()))
    return (
        f"; {len(found)} linears are quantised in a way that is not read here (the first is `{first}`, "
        f"{type(linear.weight).__name__}), so do this before the model is quantised"
    )


def quantized_weight(module: nn.Module) -> QuantizedWeight:
    """The weight of a quantised linear. It shares the module's tensors.

    Raises:
        ValueError: if it is not quantised yet, which bitsandbytes does when the module is moved to a device.
    """
    linear: Any = module
    if bits(linear) == 8:
        codes, absmax = linear.weight.detach().as_subclass(torch.Tensor), _row_scales(linear)
        if codes.dtype != torch.int8 or absmax is None:
            raise _not_yet(linear)
        return EightBitWeight(codes, absmax)
    state = _state(linear)
    if state is None:
        raise _not_yet(linear)
    codes = linear.weight.detach().as_subclass(torch.Tensor).view(torch.uint8).reshape(-1)
    size, absmax = (int(state.shape[0]), int(state.shape[1])), state.absmax.reshape(-1)
    table = state.code.to(codes.device)
    if not state.nested:
        return FourBitWeight(codes, absmax, table, size, state.blocksize)
    nested = state.state2
    offset = torch.as_tensor(state.offset, device=codes.device)
    return FourBitWeight(
        codes, absmax, table, size, state.blocksize, nested.absmax, nested.code, offset, nested.blocksize
    )


@torch.no_grad()
def write_quantized(module: nn.Module, weight: QuantizedWeight) -> None:
    """Overwrite the codes and scales of a quantised linear, in place, with those of a weight of the same layout."""
    now = quantized_weight(module)
    for old, new in zip(now, weight, strict=True):
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
            old.copy_(new)
    state: Any = getattr(module, "state", None)
    if isinstance(now, EightBitWeight) and state.CB is not None and state.CB.data_ptr() != now.codes.data_ptr():
        state.CB.copy_(now.codes)
    if isinstance(now, FourBitWeight) and now.offset is not None:
        state = _state(module)
        if now.offset is not state.offset:  # a plain number
            state.offset = now.offset


def copy_of(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight in tensors of its own."""
    form: Any = type(weight)
    made: QuantizedWeight = form(*(part.clone() if isinstance(part, torch.Tensor) else part for part in weight))
    return made


def compute_dtype(module: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype in which the module would multiply `x`, as its user has set it (`bnb_4bit_compute_dtype`)."""
    dtype: torch.dtype | None = getattr(module, "compute_dtype", None)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def dequantized_linear(module: nn.Module, weight: torch.Tensor) -> nn.Linear:
    """A frozen nn.Linear with this weight, (out, in), and the module's bias in the same dtype."""
    linear: Any = module
    with torch.device("meta"):
        made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().to(weight.dtype), requires_grad=linear.bias.requires_grad)
    return made.train(linear.training)


def _row_scales(linear: Any) -> torch.Tensor | None:
    # They are with the weight until the first forward takes them to `state`.
    scales = getattr(linear.weight, "SCB", None)
    scales = linear.state.SCB if scales is None else scales
    return None if scales is None else scales.detach().reshape(-1)


def _state(linear: Any) -> Any:
    """The scales and tables of a Linear4bit, in the layout in which they are saved; None if it is not quantised.

    On CPUs with AVX512-BF16, a forward in evaluation mode leaves codes and scales in another order.
    """
    state = getattr(linear.weight, "quant_state", None) or linear.quant_state
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as undo

        linear.weight.data, linear.weight.quant_state = undo(linear.weight.data, state)
        linear.quant_state = state = linear.weight.quant_state
    return state


def _not_yet(linear: nn.Module) -> ValueError:
    return ValueError(
        f"A quantised weight is read, got a {type(linear).__name__} that is not quantised yet, which bitsandbytes "
        "does when a module is moved to a device; call `model.to(device)` first, 'cpu' included."
    )
