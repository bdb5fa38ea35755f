"""Adding an adapter, wholly or not at all: what is asked of its name and config, and the way back when adding or
loading fails.

PEFT adds an adapter layer by layer, and keeps its parameters as attributes of containers, by its name. A second
`get_peft_model` on the same base model, as of a notebook's cell that runs again, makes a new adapter in the place of
the one that has the name: nothing of that one is left in any layer, unless the new one cannot be added.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_sparse.tuners.merging import check_not_merged


def check_adapter_name(name: Any, layer_cls: Any) -> None:
    """Raises:
    ValueError: if parameters cannot have this name in the containers of a method's tuner layers."""
    layer = layer_cls(nn.Linear(1, 1, device=torch.device("meta")), "")
    containers = [nn.ModuleDict(), *(child for key, child in layer.named_children() if key != "base_layer")]
    if isinstance(name, str) and name and "." not in name and not any(hasattr(c, name) for c in containers):
        return
    raise ValueError(
        "The name of an adapter is a key of torch's ParameterDict and ModuleDict: not empty, without a dot, and no "
        f"attribute of theirs such as 'train' or 'keys', got {name!r}; take another, such as 'my_adapter'."
    )


def warn_of_no_copy(tuner: Any, adapter_name: str) -> None:
    """Where a new adapter is made of the very config of a trained one: TRL's trainers make their reference so, and
    copy into it the parameters with `.default.` inside of their names, which ours end with, as IA3's do.

    Args:
        tuner: with the config of the new adapter among its own.
    """
    config = tuner.peft_config[adapter_name]
    for name, other in tuner.peft_config.items():
        layers = [layer for layer in tuner.sparse_layers() if layer.present_adapters([name])]
        if name != adapter_name and other is config and not all(layer.is_new(name) for layer in layers):
            warnings.warn(
                f"A new adapter starts as its config says, got {adapter_name!r} with the config of {name!r}, which is "
                "trained: it is no copy of it. TRL takes it for one, as the reference that DPOTrainer, KTOTrainer and "
                "GRPOTrainer keep the model close to: hand them the merged model and a `peft_config`, or a "
                "`ref_model`. If it is to start anew, give it a config of its own.",
                stacklevel=4,
            )


@contextmanager
def configs_kept(model: Any) -> Iterator[None]:
    """For the time in which a tuner is made: the configs of a model that has adapters already are as they were, if
    that fails."""
    configs = getattr(model, "peft_config", None)
    before = dict(configs) if isinstance(configs, dict) else {}
    try:
        yield
    except BaseException:
        if isinstance(configs, dict):
            configs.clear()
            configs.update(before)
        raise


@contextmanager
def adding(model: nn.Module, layer_cls: Any, adapter_name: str) -> Iterator[None]:
    """For the time in which an adapter is added to a model, which is as it was if that fails.

    Args:
        layer_cls: the method's tuner layer.

    Raises:
        ValueError: if an adapter of this name is there, and merged.
    """
    before = _BeforeAdding(model, layer_cls, adapter_name)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class _BeforeAdding:
    """A model as it is before an adapter is added, but without another one of its name."""

    def __init__(self, model: nn.Module, layer_cls: Any, adapter_name: str) -> None:
        self._model, self._kinds, self._name = model, (layer_cls, AuxiliaryTrainingWrapper), adapter_name
        wrappers = dict(self._wrappers())
        layers = [module for module in dict.fromkeys(wrappers.values()) if isinstance(module, layer_cls)]
        for layer in layers:
            check_not_merged(layer, adapter_name, "A new adapter takes the place of")
        self._active = {name: module._active_adapter for name, module in wrappers.items()}
        # PEFT keeps modules that an adapter of this name trains whole, whatever the method
        self._whole = {name for name, module in wrappers.items() if adapter_name in getattr(module, "_adapters", ())}
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._taken = [taken for layer in layers for taken in layer.take_out(adapter_name)]

    def restore(self) -> None:
        """Take the adapter out of the layers that have got it."""
        for name, module in reversed(self._wrappers()):  # what is inside of another one comes first
            if name not in self._active:
                parent, _, child = name.rpartition(".")
                setattr(self._model.get_submodule(parent), child, _unwrapped(module))
                continue
            if not isinstance(module, AuxiliaryTrainingWrapper):
                module.take_out(self._name)
            elif name not in self._whole:
                module.delete_adapter(self._name, new_active_adapters=_others(module.active_adapters, self._name))
            module._active_adapter = self._active[name]
        for holder, value in self._taken:
            holder[self._name] = value
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)

    def _wrappers(self) -> list[tuple[str, Any]]:
        modules = self._model.named_modules(remove_duplicate=False)
        return [(name, module) for name, module in modules if isinstance(module, self._kinds)]


def take_back(model: Any, tuner: Any, adapter_name: str) -> None:
    """Remove an adapter that PEFT added only to load it, so that a checkpoint that does not fit leaves no trace.

    An adapter that the user made, or that was trained or loaded before, stays.

    Args:
        model: with PEFT's functions, and the tuner as its base model.
    """
    layers = [layer for layer in tuner.sparse_layers() if layer.present_adapters([adapter_name])]
    if not all(layer.is_new(adapter_name) for layer in layers):
        return
    if len(tuner.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    for name, module in list(tuner.model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # unloading would put its copy in place
            parent, _, child = name.rpartition(".")
            setattr(tuner.model.get_submodule(parent), child, module.original_module)
    tuner.unload()
    for name, parameter in tuner.model.named_parameters():
        parameter.requires_grad_(name in tuner.trainable_before)


def _unwrapped(module: Any) -> nn.Module:
    """What a tuner layer, or PEFT's wrapper of a module that is trained whole, was put around."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer


def _others(names: list[str], name: str) -> list[str]:
    return [other for other in names if other != name]
