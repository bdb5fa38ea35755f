"""Adapter weights that accelerate keeps elsewhere: here for a forward, or for good where they are to be trained; and
base weights that it keeps elsewhere, for which transformers reads no adapter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from peft_sparse.linears import keep_loaded, offload_hook, weights_loaded
from peft_sparse.tuners.sparse_config import SparseConfig


def check_loads_whole(model: nn.Module, config: Any) -> None:
    """Before an adapter is made whose weights transformers reads itself (`model.load_adapter`, or `from_pretrained` of
    an adapter's folder): it passes over modules on disk, whose factors would stay as they were drawn.

    Args:
        config: as PEFT hands it on: one config from transformers, a dict of them from PEFT's own classes, which take
            off the hooks before they make an adapter, and dispatch the model anew.

    Raises:
        ValueError: if accelerate keeps a weight of the model elsewhere.
    """
    if not isinstance(config, SparseConfig) or not config.awaits_weights:
        return
    for name, module in model.named_modules():
        if offload_hook(module) is not None and any(p.is_meta for p in module.parameters(recurse=False)):
            raise ValueError(
                "transformers loads an adapter for a model that is wholly in memory, got one with the weights of "
                f"`{name}` kept elsewhere by accelerate; let PEFT load it: `PeftModel.from_pretrained(model, folder, "
                "device_map={f'base_model.model.{name}': place for name, place in model.hf_device_map.items()}, "
                "offload_folder=...)`."
            )


def adapters_loaded(layer: Any) -> AbstractContextManager[Any]:
    """A context in which the adapters' weights of a SparseLayer are here.

    Raises:
        ValueError: if they are to be trained: their gradients would be lost.
    """
    offloaded = [container for container in layer.adapter_containers() if offload_hook(container) is not None]
    if not offloaded:
        return nullcontext()
    if torch.is_grad_enabled() and any(p.requires_grad for module in offloaded for p in module.parameters()):
        raise ValueError(
            f"An adapter that is trained stays in memory, got one that accelerate has offloaded in "
            f"`{layer.module_name}`, so that its gradients would be lost; call "
            "`model.base_model.keep_adapters_loaded()` before the optimizer is made, or dispatch the model before "
            "`get_peft_model`."
        )
    return weights_loaded(*offloaded)


def keep_adapters_loaded(layer: Any, stored: dict[str, torch.Tensor] | None = None) -> None:
    """Bring in all adapter weights of a SparseLayer, for good. The base weight stays where it is.

    Args:
        stored: by their name in this layer, weights that accelerate may not find again.
    """
    for name, container in layer.named_children():
        if name != "base_layer":
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in (stored or {}).items()}
            keep_loaded(container, own)
