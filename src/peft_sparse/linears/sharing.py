"""Which modules of a model have a weight in common, such as a head that is tied to the embeddings.

A weight that accelerate keeps elsewhere is an empty one in the model, of each module its own. So it is asked for where
the hooks look for it.
"""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn

from peft_sparse.linears.hooks import offload_hook


def shared_weights(model: nn.Module) -> dict[nn.Module, dict[str, nn.Module]]:
    """The modules that have a parameter in common with others, and those others by full name. A bias in common, which
    nothing here changes, does not count, and neither does one module in several places."""
    owners: dict[Any, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            if last != "bias":
                key = storage_key(model, f"{name}.{last}".lstrip("."), parameter)
                owners.setdefault(key, {})[name] = module
    shared: dict[nn.Module, dict[str, nn.Module]] = {}
    for modules in owners.values():
        for module in modules.values() if len(modules) > 1 else ():
            others = {name: other for name, other in modules.items() if other is not module}
            shared.setdefault(module, {}).update(others)
    return shared


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


def storage_key(model: nn.Module, name: str, parameter: nn.Parameter) -> Any:
    """Equal for two parameters (by full name) that share their numbers. Of what is on disk nothing is known, and all
    keys differ."""
    if not parameter.is_meta:
        return id(parameter)
    path, _, last = name.rpartition(".")
    hook, _, between = holder_of(model, path)
    if hook is None:
        return id(parameter)
    mapping, key = unprefixed(hook.weights_map, f"{between}{last}")
    tensors = mapping.state_dict if isinstance(mapping, OffloadedWeightsLoader) else mapping
    return ("data", tensors[key].data_ptr()) if key in tensors else ("disk", name)
