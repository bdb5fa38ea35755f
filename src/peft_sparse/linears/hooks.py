"""What is attached to a module: hooks that have to run when another function computes in its place.

A tuner layer computes with the weight of its base layer without calling it. But calling a module is what brings in a
weight that accelerate keeps in CPU memory or on disk (the module's own is empty until then), and what runs anybody's
forward and backward hooks. So a base layer with hooks is called, with the other function as its forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from accelerate.utils import named_module_tensors, set_module_tensor_to_device
from torch import nn

from peft_sparse.linears.sharded import gathered


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that brings in a module's offloaded parameters, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", [hook]):
        if isinstance(candidate, AlignDevicesHook) and candidate.offload:
            return candidate
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks) or hasattr(module, "_hf_hook")


@contextmanager
def temporary_forward(module: nn.Module, forward: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """Another forward for a module, which gets its own back afterwards. The module stays what others read of it.

    Args:
        name: of the attribute: some libraries have replaced `forward` already, and put the old one elsewhere.
    """
    before = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def call_as(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` as the forward of a module, with all that is attached to the module around it. Threads that
    share a module take turns: each would put back what it has found there, the other's function."""
    name = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"  # accelerate's own forward calls the old one
    with _turn_of(module), temporary_forward(module, function, name):
        return module(*args)


_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def _turn_of(module: nn.Module) -> AbstractContextManager[Any]:
    if torch.compiler.is_compiling():  # a graph is recorded by one thread at a time
        return nullcontext()
    return _TURNS.setdefault(module, threading.RLock())


@contextmanager
def weights_loaded(*modules: nn.Module, recurse: bool = True) -> Iterator[bool]:
    """The weights of these modules are in them and whole, to read: those that accelerate keeps elsewhere, and those
    that are sharded over processes, which then enter this together. Changes do not last.

    Args:
        recurse: sharded weights of submodules, too.

    Yields:
        Whether something was sharded. Then a parameter is gone after the block, unless it was copied.
    """
    hooked = [
        (hook, module) for module in modules if (hook := offload_hook(module)) is not None and _is_away(hook, module)
    ]
    entered: list[tuple[AlignDevicesHook, nn.Module]] = []
    try:
        for hook, module in hooked:
            hook.pre_forward(module)
            entered.append((hook, module))
        with gathered(*modules, recurse=recurse) as was_sharded:
            yield was_sharded
    finally:
        for hook, module in entered:
            hook.post_forward(module, torch.empty(0))


def _is_away(hook: AlignDevicesHook, module: nn.Module) -> bool:
    """Whether a hook is still to bring in something: a second time, its end would also be that of the first."""
    return any(tensor.is_meta for _, tensor in named_module_tensors(module, recurse=hook.place_submodules))


def keep_loaded(module: nn.Module, stored: dict[str, torch.Tensor] | None = None) -> None:
    """Bring in a module's offloaded weights for good.

    Args:
        stored: by name, weights that are taken as they are given here: when PEFT loads an adapter for a model on disk,
            accelerate does not know where the adapter's file has them.
    """
    hook, stored = offload_hook(module), stored or {}
    if hook is None:
        return
    names = [name for name, _ in named_module_tensors(module, recurse=False)]
    if not stored.keys() >= set(names):
        hook.pre_forward(module)
    hook.original_devices = {}  # where removing the hook would put them, which for some on disk is nowhere
    remove_hook_from_module(module)
    for name in names:
        if name in stored:
            set_module_tensor_to_device(module, name, hook.execution_device, value=stored[name])


def device_of(parameter: torch.Tensor, module: nn.Module) -> torch.device:
    """Where a module's forward runs: with its weight, or where accelerate brings that."""
    hook = offload_hook(module)
    if not parameter.is_meta or hook is None or hook.execution_device is None:
        return parameter.device
    return torch.empty(0, device=hook.execution_device).device
