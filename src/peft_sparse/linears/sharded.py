"""Weights that are spread over several processes: reading and writing them whole.

FSDP2 keeps parameters as DTensors and DeepSpeed's ZeRO-3 as empty tensors, each process with its share, and both put
the whole ones in place while a module's forward runs. So forwards need nothing from here. What looks at a weight at
another time (merging, counting zeros) does so inside [`gathered`], since a share has other zeros, another threshold
and another shape than the weight.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, of all its shares together."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_share(parameter: torch.Tensor | None) -> bool:
    """Whether this process has only its share of a parameter at the moment."""
    return is_dtensor(parameter) or _is_away(parameter)


def whole_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter: itself unless this process has only its share. All processes have to ask at once."""
    if is_dtensor(parameter):
        return _whole(parameter)
    if not _is_away(parameter):
        return parameter
    with zero_gathered([parameter]):
        return parameter.detach().clone()


def is_dtensor(parameter: Any) -> bool:
    """Whether it is a parameter as FSDP2 keeps it."""
    return hasattr(parameter, "full_tensor")  # torch.distributed is not imported for it


def _is_away(parameter: torch.Tensor | None) -> bool:
    """Whether ZeRO-3 has put the parameter's numbers away."""
    return parameter is not None and hasattr(parameter, "ds_id") and parameter.shape != whole_shape(parameter)


@contextmanager
def gathered(*modules: nn.Module, write: Iterable[nn.Module] = (), recurse: bool = True) -> Iterator[bool]:
    """The parameters of these modules, whole, while the block runs. Does nothing for models that are not sharded.

    All processes have to enter it together, as for any collective.

    Args:
        modules: whose parameters are wanted.
        write: modules among them, or among their submodules, whose own parameters the block changes. What the first
            process leaves in those is kept; all other changes are lost.
        recurse: parameters of submodules are wanted, too.

    Yields:
        Whether there was something to gather. Then a parameter is gone after the block, unless it was copied.

    Examples:
        >>> linear = nn.Linear(4, 2)
        >>> with gathered(linear, write=[linear]):
        ...     _ = linear.weight.data.fill_(1)
    """
    inside = (module for top in modules for module in top.modules()) if recurse else modules
    owners, written = dict.fromkeys(inside), set(write)
    slots = [
        (owner, name)
        for owner in owners
        for name in owner._parameters
        # one that ZeRO-3 has whole at the moment has shares too, which writing has to reach
        if is_share(_raw(owner, name)) or (owner in written and hasattr(_raw(owner, name), "ds_id"))
    ]
    if not slots:
        yield False
        return
    read, change = ([_raw(*slot) for slot in slots if (slot[0] in written) == wanted] for wanted in (False, True))
    with zero_gathered(read), zero_gathered(change, modifier_rank=0):
        shares = [(owner, name, share) for owner, name in slots if is_dtensor(share := _raw(owner, name))]
        for owner, name, share in shares:
            owner._parameters[name] = nn.Parameter(_whole(share), share.requires_grad)
        try:
            yield True
            for owner, name, share in shares:
                if owner in written:
                    _scatter(owner._parameters[name], share)
        finally:
            for owner, name, share in shares:
                owner._parameters[name] = share


def _raw(owner: nn.Module, name: str) -> Any:
    # `.get`, since ZeRO-3 replaces `_parameters` by a dict that gathers what is looked up by [] inside a forward
    return owner._parameters.get(name)


@torch.no_grad()
def _whole(share: Any) -> torch.Tensor:
    device = share.device
    if device.type != share.device_mesh.device_type:  # FSDP2's CPU offload: its collectives run on the mesh's device
        return share.to(share.device_mesh.device_type).full_tensor().to(device)
    whole = share.full_tensor().detach()
    # of a single process, or a tensor that all have whole, it is the share itself
    return whole.clone() if whole.data_ptr() == share.to_local().data_ptr() else whole


@torch.no_grad()
def _scatter(whole: Any, share: Any) -> None:
    """Give every process its share of what the first one has."""
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.detach().to(share.device_mesh.device_type)
    share.copy_(distribute_tensor(on_device, share.device_mesh, share.placements).to(share.device))


@contextmanager
def zero_gathered(parameters: Iterable[Any], modifier_rank: int | None = None) -> Iterator[None]:
    """DeepSpeed's own context, for those that are its: whole while the block runs, in all processes, which enter it
    together.

    Args:
        modifier_rank: the process whose changes are kept, None if nothing is changed.
    """
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed  # it is there, since its parameters are

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank):
        yield


def reshard(model: nn.Module) -> None:
    """Have FSDP2 drop the whole weights that it keeps after a forward, as it does for a model's outermost unit: what
    is written into those is lost when they are dropped later.

    The outermost unit may be around `model`, where no module knows of it: a PeftModel around its tuner.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    unit_class = getattr(fsdp, "FSDPModule", None)
    if unit_class is None or not torch.distributed.is_initialized():
        return
    inside = {id(module) for module in model.modules()}
    for unit in (thing for thing in gc.get_objects() if issubclass(type(thing), unit_class)):
        if id(unit) in inside or any(module is model for module in unit.modules()):
            unit.reshard()
