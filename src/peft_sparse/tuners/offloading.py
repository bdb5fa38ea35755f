"""Adapter weights that accelerate keeps elsewhere: here for a forward, or for good where they are to be trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from peft_sparse.linears import keep_loaded, offload_hook, weights_loaded


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
