"""Which modules of a model have a weight in common, such as a head that is tied to the embeddings, and which are in
several places.

A weight that accelerate keeps elsewhere is an empty one in the model, of each module its own. So it is asked for where
the hooks look for it.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import OffloadedWeightsLoader
from torch import nn

from peft_sparse.linears.offloaded import holder_of, unprefixed


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


def several_places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The modules that a model has in several places: for each place the module around it, and the name there. What
    is inside of such a module has one place, if it is not in several there."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return {module: found for module, found in places.items() if len(found) > 1}


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
