"""The tensors of a saved adapter, compared with those of the model before the first one is loaded.

PEFT loads what fits by name and drops the rest: a missing factor would stay at its random start, one of integers would
be taken for numbers, and nothing but a warning would tell.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from peft_sparse.linears import block_linears, is_dtensor, weight_parameter

# PEFT adds these to `modules_to_save` for a `task_type`, whether a model has them or not.
HEADS = {"classifier", "score", "qa_outputs"}
_WAY_OUT = (
    "load it onto its base model (see `base_model_name_or_path` in its adapter_config.json), with the config it was "
    "saved with. Nothing was loaded."
)
_DAMAGED = "the file is damaged, or was changed: save or download it again. Nothing was loaded."


def adapter_keys(model: nn.Module, layer_cls: Any, adapter_name: str) -> set[str]:
    """Where an adapter's tensors may be in a model's state dict; a layer has some of them, as its config says.

    Args:
        layer_cls: the method's tuner layer.
    """
    kinds = (*layer_cls.adapter_layer_names, *layer_cls.other_param_names)
    layers = (name for name, module in model.named_modules() if isinstance(module, layer_cls))
    return {f"{name}.{kind}.{adapter_name}" for name in layers for kind in kinds}


def check_adapter_state(
    loaded: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], possible: set[str], prefix: str
) -> None:
    """Compare a state dict that is about to be loaded with the model's.

    Args:
        loaded: tensors by their key in the model.
        current: the model's own state dict.
        possible: from [`adapter_keys`].
        prefix: of the method's parameters, "pst_" or "spp_".

    Raises:
        ValueError: if a tensor of the adapter is missing, has no place, or has another shape or kind of dtype; or if
            it holds NaN or infinity.
    """
    missing = sorted((possible & current.keys()) - loaded.keys())
    if missing:
        raise ValueError(
            f"An adapter checkpoint has all tensors of its adapter, got none for `{missing[0]}` ({len(missing)} are "
            f"missing); {_WAY_OUT}"
        )
    stray = sorted(key for key in loaded.keys() - current.keys() if f".{prefix}" in key)
    if stray:
        raise ValueError(
            f"An adapter checkpoint fits the modules that carry the adapter, got `{stray[0]}` ({len(stray)} in all), "
            f"which this model has not; {_WAY_OUT}"
        )
    for key, tensor in loaded.items():
        if key in current:
            _check_tensor(key, tensor, current[key])


def _check_tensor(key: str, tensor: torch.Tensor, here: torch.Tensor) -> None:
    if here.shape != tensor.shape:
        of_tokens = any(f".{name}." in key for name in EMBEDDING_LAYER_NAMES)
        resize = f"call `model.resize_token_embeddings({len(tensor)})` first, or "
        raise ValueError(
            f"The shapes of an adapter checkpoint fit the model that it was trained on, got {tuple(tensor.shape)} for "
            f"`{key}`, which has shape {tuple(here.shape)} here; {resize if of_tokens else ''}{_WAY_OUT}"
        )
    if tensor.is_floating_point() != here.is_floating_point() or tensor.is_complex() != here.is_complex():
        raise ValueError(
            f"The tensors of an adapter checkpoint are numbers of the same kind as the model's, got {tensor.dtype} "
            f"for `{key}`, which is {here.dtype} here; {_DAMAGED}"
        )
    share: Any = tensor
    own = share.to_local() if is_dtensor(tensor) else tensor  # of FSDP2's shards each process checks its own
    if own.is_floating_point() and not own.is_meta and not bool(own.isfinite().all()):
        found = int((~own.isfinite()).sum())
        raise ValueError(
            f"The tensors of an adapter checkpoint are finite, got {found} NaN or infinite of {tensor.numel()} in "
            f"`{key}`: its training diverged, or {_DAMAGED}"
        )


def cast_to_base_dtype(layer: Any, adapter_name: str) -> None:
    """Give the factors of a SparseLayer's adapter the dtype of the base weight, where that is one of numbers: what
    PEFT's `autocast_adapter_dtype=False` means."""
    dtype, new = weight_parameter(layer.base_layer).dtype, layer.is_new(adapter_name)
    for name in layer.adapter_layer_names:
        factors = getattr(layer, name)
        if adapter_name in factors and dtype.is_floating_point and factors[adapter_name].dtype != dtype:
            factor = factors[adapter_name]
            factors[adapter_name] = nn.Parameter(factor.detach().to(dtype), requires_grad=factor.requires_grad)
    if new:
        layer.mark_new(adapter_name)


def names_with_weights(model: nn.Module, names: Iterable[str] | None) -> tuple[str, ...]:
    """Those of `modules_to_save` that name, by how it ends, a module with weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    full_names = [full for full, module in modules.items() if next(module.parameters(), None) is not None]
    return tuple(name for name in names or () if any(full.endswith(name) for full in full_names))


def check_modules_to_save(config: Any, model: nn.Module, targets: Container[str]) -> None:
    """What PEFT would find out when half of the model has adapters, or never: it leaves out what names nothing.

    Args:
        config: a SparseConfig that knows which of its names the model has.

    Raises:
        ValueError: if one of the names is that of an adapted linear, of a part of a block that holds some, or, unless
            the adapter was saved so, of nothing; or if the weights that are to be loaded have none for a module.
    """
    names, modules = config.modules_to_save or (), dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in names if name not in HEADS and not any(full.endswith(name) for full in modules)]
    if unknown and not config.awaits_weights:
        raise ValueError(
            f"`modules_to_save` has names of modules, or how they end, got {unknown[0]!r}, which is none of "
            f"{type(model).__name__}{_nearest(unknown[0], modules)}; mend it, or leave it out."
        )
    if config.awaits_weights:
        config.check_whole_modules(config.names_found)
    adapted = {name for name in modules if name in targets}
    in_blocks = adapted & block_linears(model).keys() if names else set()
    for name in modules:
        inside = [target for target in in_blocks if target.startswith(f"{name}.")]
        if name.endswith(tuple(names)) and (name in adapted or inside):
            raise ValueError(
                f"A module is trained whole or its linears get adapters, got `{name}` in `modules_to_save`"
                f"{f', which holds `{inside[0]}`,' if inside else ''} and in `target_modules`; leave it out of one."
            )


def check_trainable_tokens(tokens: Any, model: Any) -> None:
    """What PEFT finds out when all linears have adapters.

    Args:
        tokens: `trainable_token_indices` of a config: of the input embedding, or by the name of each module.

    Raises:
        ValueError: if a token is beyond those that the embedding has.
    """
    if tokens is None:
        return
    if not isinstance(tokens, dict):
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        names = {name: tokens for name, module in model.named_modules() if module is embedding}
        tokens = names or {"embed_tokens": tokens}  # PEFT's default
    for full, module in model.named_modules():
        module = getattr(module, "original_module", module)  # what another adapter's tokens are wrapped around
        rows = getattr(module, "num_embeddings", getattr(module, "out_features", None))
        for name, several in tokens.items():
            if isinstance(rows, int) and full.endswith(name) and max(several) >= rows:
                raise ValueError(
                    f"`trainable_token_indices` has tokens of the embedding, from 0 up to {rows - 1} in `{full}`, got "
                    f"{max(several)}; for new ones call `model.resize_token_embeddings(len(tokenizer))` first."
                )


def labels_of(model: nn.Module) -> list[str] | None:
    """What a model's config calls its labels, in the order of their numbers; None where it has no names of its own."""
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(name) for _, name in sorted(named.items())]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _nearest(name: str, modules: Iterable[str]) -> str:
    ends = sorted({full.rpartition(".")[2] for full in modules} - {""})
    near = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.5)
    return f" (the nearest name is {near[0]!r})" if near else ""
