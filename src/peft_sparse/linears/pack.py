"""A whole model's linears packed in place, and back: see packed.py for what a packed linear is.

One layer at a time is in memory in both forms.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse.linears.blocks import Names, check_model, select_linears
from peft_sparse.linears.hooks import offload_hook
from peft_sparse.linears.packed import PackedLinear
from peft_sparse.linears.saving import allow_save_pretrained, is_packed, refuse_save_pretrained
from peft_sparse.linears.sharing import shared_weights
from peft_sparse.linears.weights import forward_replaced, in_out_features, num_zeros, plain_class, weight_parameter


def pack_model(
    model: nn.Module, target_modules: Names | None = None, exclude_modules: Names | None = None
) -> nn.Module:
    """Replace a pruned model's linear layers by PackedLinears, in place.

    The model computes what it computed before; a negative zero becomes a positive one. Packed weights are frozen:
    `get_peft_model(model, SppConfig())` then trains the model in the memory of its packed weights.

    Layers stay as they are where packing does not pay (in float32 below 3.2% of zeros, in half precision below 6.3%),
    where a weight is shared with another module, and where a module has a forward, hooks or a parametrization of its
    own. Warns if all of them do.

    Args:
        model: any module without adapters.
        target_modules: names of linear layers or the ends of names, or one regex that matches full names, as in PEFT.
            None: all linear layers inside the repeated transformer blocks but routers and gates of experts.
        exclude_modules: what to leave out of them, given in the same way.

    Returns:
        `model`.

    Raises:
        ValueError: if there is no such linear layer, if one carries an adapter, or has no memory (the meta device).
            Nothing is changed then.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_sparse.linears import block_linears
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> for linear in block_linears(model).values():
        ...     _ = linear.weight.data[:, ::2].zero_()
        >>> pack_model(model).model.layers[0].mlp.up_proj
        PackedLinear(in_features=8, out_features=16, bias=False, kept=50.0%)
    """
    targets = select_linears(model, target_modules, exclude_modules, "Packing")
    for name, linear in targets.items():
        if isinstance(linear, BaseTunerLayer):
            raise ValueError(
                f"Packing replaces plain linears, got `{name}`, which carries an adapter ({type(linear).__name__}); "
                "pack the model first and add the adapter then, or call `merge_and_unload()`."
            )
        away = offload_hook(linear) is not None  # whose forward is the hook's
        if away or (_is_plain(linear) and linear.get_parameter("weight").is_meta):
            raise ValueError(
                f"Packing needs weights in memory, got `{name}`, which is on the meta device (offloaded, or never "
                "loaded); load the model without offloading."
            )
    packable = packable_linears(model, targets.values())
    for linear in targets.values():
        if id(linear) in packable:
            replace_module(model, linear, PackedLinear.from_linear(linear))
    if not is_packed(model):
        warnings.warn(
            f"Packing pays for linears with zeros, got {len(targets)} of which none was packed (the first is "
            f"`{next(iter(targets))}`); prune the model first, for example with `peft_sparse.prune_wanda`.",
            stacklevel=2,
        )
    refuse_save_pretrained(model)
    return model


def unpack_model(model: nn.Module) -> nn.Module:
    """The inverse of [`pack_model`]: every PackedLinear becomes an nn.Linear or a Conv1D again, in place.

    Returns:
        `model`; of one that is a PackedLinear itself, the new layer.

    Raises:
        ValueError: if a packed linear layer carries an adapter or is offloaded, or `model` is no module. Nothing is
            changed then.

    Examples:
        >>> unpack_model(nn.Sequential(PackedLinear.from_linear(nn.Linear(3, 2))))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and offload_hook(module) is not None:
            raise ValueError(
                f"Unpacking needs weights in memory, got `{name}`, which is offloaded; load the model without "
                "offloading, or without `packed=True`."
            )
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLinear):
            raise ValueError(
                f"Unpacking replaces plain linears, got `{name}`, which carries an adapter ({type(module).__name__}); "
                "call `merge_and_unload()` first."
            )
    if isinstance(model, PackedLinear):
        return model.to_linear()
    for module in [module for module in model.modules() if isinstance(module, PackedLinear)]:
        replace_module(model, module, module.to_linear())
    allow_save_pretrained(model)
    return model


def packable_linears(model: nn.Module, linears: Iterable[nn.Module]) -> set[int]:
    """The ids of those linears of a model that [`pack_model`] would pack: never the model itself, since who holds it
    would go on with the dense one."""
    shared = shared_weights(model)
    plain = (linear for linear in linears if linear is not model and _is_plain(linear))
    return {id(linear) for linear in plain if linear not in shared and _pays(linear)}


def _is_plain(linear: nn.Module) -> bool:
    """Whether nothing is attached to an nn.Linear or Conv1D that its packed form would not have."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    attached = any(getattr(linear, name, None) for name in hooks) or forward_replaced(linear)
    return plain_class(linear) in (nn.Linear, Conv1D) and not attached


def _pays(linear: nn.Module) -> bool:
    in_features, out_features = in_out_features(linear)
    bitmask_bytes = out_features * ((in_features + 7) // 8)
    return num_zeros(linear) * weight_parameter(linear).element_size() > bitmask_bytes


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model has `old`; a module may be in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
