"""Where accelerate keeps the weights that it has taken out of a model: in the maps of its hooks, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import PrefixedDataset
from torch import nn

from peft_sparse.linears.hooks import offload_hook


def holder_of(model: nn.Module, name: str) -> tuple[AlignDevicesHook | None, nn.Module, str]:
    """The hook that keeps a linear's parameters, the module that it is attached to, and the path between the two."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        hook = offload_hook(module)
        if hook is not None and (length == len(parts) or hook.place_submodules):
            return hook, module, "".join(f"{part}." for part in parts[length:])
    return None, model, ""


def unprefixed(mapping: Any, key: str) -> tuple[Any, str]:
    """The mapping below accelerate's prefixes, and the key in it."""
    while isinstance(mapping, PrefixedDataset):
        mapping, key = mapping.dataset, mapping.prefix + key
    return mapping, key


def stored_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a model, with the tensors that hooks keep in place of empty ones."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            yield name, tensor
            continue
        path, _, last = name.rpartition(".")
        hook, _, between = holder_of(model, path)
        yield name, tensor if hook is None else hook.weights_map[f"{between}{last}"]
