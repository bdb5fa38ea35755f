"""A pruned model's linears quantised in place, with every zero checked: see quantized.py for what they become.

transformers quantises while it loads (`quantization_config=BitsAndBytesConfig(...)`), when the weights of before are
gone by the time anybody could look. Here they are still there.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from peft_sparse.linears.blocks import Names, select_linears
from peft_sparse.linears.quantized import bits, dequantized_linear, quantized_weight, write_quantized
from peft_sparse.sparsity import quantize_like, round_keeping_support

KINDS = ("nf4", "fp4", "int8")


def quantize_model(
    model: nn.Module,
    kind: str = "nf4",
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace a pruned model's linear layers by those of bitsandbytes, in place, so that exactly its zeros are zeros.

    `get_peft_model(model, SppConfig())` then trains in the memory of the quantised weights. The model counts as
    quantised for transformers and PEFT, and `save_pretrained` writes what `from_pretrained` loads again.

    An entry that would be rounded to zero gets the smallest code of its sign instead; after pruning by magnitude there
    are few. A block of zeros stays one, which bitsandbytes itself loses on CUDA in NF4 with `double_quant`.

    Args:
        model: any module without adapters, in memory, with float32, bfloat16 or float16 weights.
        kind: "nf4", "fp4" (4 bits, blocks of 64 weights with a scale) or "int8" (a scale for each row).
        target_modules: names of linear layers or the ends of names, or one regex that matches full names, as in PEFT.
            None: all linear layers inside the repeated transformer blocks but routers and gates of experts.
        exclude_modules: what to leave out of them, given in the same way.
        double_quant: whether the scales of 4-bit weights are quantised too.
        compute_dtype: in which 4-bit linear layers multiply; None: the dtype of their weights.

    Returns:
        `model`.

    Raises:
        ImportError: without bitsandbytes.
        ValueError: for an unknown kind, if there is nothing to quantise, or if a target is no nn.Linear with finite
            weights in memory. Nothing is changed then, nor where bitsandbytes raises since it cannot quantise weights
            of such a shape or on this device.

    Examples:
        >>> # prune_wanda(model, batches, pattern="2:4")
        >>> # quantize_model(model, "nf4", compute_dtype=torch.bfloat16)
        >>> # model = get_peft_model(model, SppConfig())
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` should be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`quantize_model` needs the package bitsandbytes, which cannot be imported ({error}). Install it with "
            "`pip install 'peft-sparse[quant]'`."
        ) from error
    targets = _targets(model, target_modules, exclude_modules)
    quantizer = _quantizer(model, targets, kind, double_quant, compute_dtype)
    # What bitsandbytes cannot do with a shape, on a device, shows before anything is changed. Made one after the
    # other, the new layers take the place of the old ones in memory, too.
    kinds = {(linear.weight.shape, linear.weight.dtype, linear.weight.device): linear for linear in targets.values()}
    for linear in kinds.values():
        _quantized(linear, kind, double_quant, compute_dtype)
    for name, linear in targets.items():
        made = _quantized(linear, kind, double_quant, compute_dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    if quantizer is not None:
        _tell_transformers(model, quantizer, kind)
    return model


def _targets(model: nn.Module, wanted: Names | None, excluded: Names | None) -> dict[str, nn.Linear]:
    targets: dict[str, nn.Linear] = {}
    for name, linear in select_linears(model, wanted, excluded, "Quantising").items():
        if type(linear) is not nn.Linear or linear.weight.is_meta or hasattr(linear, "_hf_hook"):
            elsewhere = " whose weight is elsewhere" if type(linear) is nn.Linear else ""
            raise ValueError(
                "Quantising replaces instances of torch.nn.Linear with weights in memory, got "
                f"{type(linear).__name__}{elsewhere} in `{name}`; exclude it with `exclude_modules`, or quantise "
                "before adapters are added."
            )
        if linear.weight.element_size() > 4 or not linear.weight.isfinite().all():
            what = linear.weight.dtype if linear.weight.element_size() > 4 else "NaN or infinity"
            raise ValueError(f"Quantising takes finite weights in at most 32 bits, got {what} in `{name}`.")
        targets[name] = linear
    return targets


@torch.no_grad()
def _quantized(linear: nn.Linear, kind: str, double_quant: bool, compute_dtype: torch.dtype | None) -> nn.Module:
    import bitsandbytes as bnb

    weight, bias = linear.weight.detach(), linear.bias
    made: Any
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias is not None, has_fp16_weights=False, device="meta"
        )
        made.weight = bnb.nn.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias is not None, compute_dtype or weight.dtype,
            compress_statistics=double_quant, quant_type=kind, device="meta",
        )  # fmt: skip
        made.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, compress_statistics=double_quant, quant_type=kind, module=made
        )
    made.bias = bias
    made = made.to(weight.device)  # which quantises
    write_quantized(made, quantize_like(quantized_weight(made), weight))
    return made.train(linear.training)


def _quantizer(
    model: nn.Module, targets: dict[str, nn.Linear], kind: str, double_quant: bool, compute_dtype: torch.dtype | None
) -> Any:
    """The one that transformers would have loaded a model with, if it is one of its own."""
    if not isinstance(model, PreTrainedModel):
        return None
    from transformers.quantizers import AutoHfQuantizer

    linears = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and bits(m) is None)
    kept = [name for name in linears if name not in targets]
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=compute_dtype or model.dtype, llm_int8_skip_modules=kept,
        )  # fmt: skip
    return AutoHfQuantizer.from_config(config, pre_quantized=False)


def _tell_transformers(model: nn.Module, quantizer: Any, kind: str) -> None:
    """What `from_pretrained` leaves on a model that it has quantised."""
    holder: Any = model
    holder.hf_quantizer = quantizer
    holder.config.quantization_config = quantizer.quantization_config
    holder.quantization_method = quantizer.quantization_config.quant_method
    holder.is_quantized = True
    setattr(holder, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replace all quantised linear layers of bitsandbytes by nn.Linear, in place; all other floating point parameters
    are cast to the same dtype. A transformers model no longer counts as quantised.

    Args:
        model: without adapters on quantised linear layers.
        dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        `model`.

    Raises:
        ValueError: for a dtype that is not floating, or if a quantised linear carries an adapter. Nothing is changed
            then.
    """
    check_float(dtype)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and bits(module.get_base_layer()) is not None:
            raise ValueError(
                f"Dequantising replaces plain layers, got `{name}`, which carries an adapter "
                f"({type(module).__name__}); call `model.merge_and_unload(dequantize_to=...)`."
            )
    for name, module in list(model.named_modules()):
        if bits(module) is not None:
            dense = quantized_weight(module).dense()
            made = dequantized_linear(module, round_keeping_support(dense, dense != 0, dtype))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(flag, None)
    if isinstance(model, PreTrainedModel):
        model.config.dtype = dtype
    return model


def check_float(dtype: torch.dtype) -> None:
    """Raises:
    ValueError: for a dtype that dense weights are not kept in."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"Dequantised weights are torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}.")
