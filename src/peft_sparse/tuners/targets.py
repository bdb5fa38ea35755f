"""Which linears get adapters by default, and which cannot: an adapter works where its linear is called, and merging
writes into that linear's weight, so no other module may compute with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_sparse.linears import (
    block_linear_names,
    block_linears,
    check_own_weight,
    computes_linear,
    forward_replaced,
    is_foreign,
    is_linear,
    linears_not_called,
    names_in_blocks,
    shared_weights,
    unwrap,
)

_UNTIE = (
    "give it one of its own, `module.weight = torch.nn.Parameter(module.weight.clone())` (for a head that is tied to "
    "the embeddings also `model.config.tie_word_embeddings = False`)"
)


def default_targets(model: nn.Module) -> set[str]:
    """What `target_modules=None` means: names that match the linears inside the model's repeated blocks, but no
    routers (see [`peft_sparse.linears.is_router`]), and not those whose weight another module computes with, that
    another adapter trains whole, or whose forward was replaced. Warns with the names of what is left out.

    Raises:
        ValueError: if the model has no repeated blocks.
    """
    names, linears = block_linear_names(model), block_linears(model)
    not_called, shared = linears_not_called(model), shared_weights(model)
    whole = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    copied = [full for full in linears if full.startswith(whole)]
    replaced = [full for full in linears if full not in copied and _has_own_forward(unwrap(linears[full]))]
    left_out = {*not_called, *copied, *replaced}
    called = [full for full in linears if full not in left_out] or list(linears)
    targets = {full for full in called if unwrap(linears[full]) not in shared} or set(called)  # see `check_alone`
    if routers := [full for full in block_linears(model, routers=True) if full not in linears]:
        warnings.warn(
            "The default targets are linears but no routers and gates of experts, so "
            f"{names_in_blocks(routers)} get no adapter; to adapt one, name it in `target_modules` beside the others.",
            stacklevel=2,
        )
    if copied:
        warnings.warn(
            f"The default targets are linears that no adapter trains whole, so {names_in_blocks(copied)} get no "
            "adapter: `modules_to_save` of an adapter that is there already names them.",
            stacklevel=2,
        )
    if replaced:
        warnings.warn(
            f"The default targets are linears that compute x W^T + b, so {names_in_blocks(replaced)} get no adapter: "
            "their `forward` was replaced, which an adapter would compute without.",
            stacklevel=2,
        )
    if taken := [full for full in linears if full in not_called and full not in called and full not in copied]:
        warnings.warn(
            f"The default targets are linears that are called, so {len(taken)} of {len(linears)} get no adapter: "
            f"{names_in_blocks(taken)}, whose weight {not_called[taken[0]]} takes without calling it, or not always.",
            stacklevel=2,
        )
    if common := [full for full in called if full not in targets]:
        warnings.warn(
            f"The default targets are linears with a weight of their own, so {len(common)} of {len(linears)} get no "
            f"adapter (the first is `{common[0]}`, whose weight is also that of "
            f"`{next(iter(shared[unwrap(linears[common[0]])]))}`): merging would change both. To adapt such a linear, "
            f"{_UNTIE}.",
            stacklevel=2,
        )
    names = {name for name in names if not any(_ends_with(full, name) for full in linears.keys() - targets)}
    by_name = {full for full in linears if any(_ends_with(full, name) for name in names)}
    return names if by_name == targets else targets


def default_targets_of(config: Any, model: nn.Module) -> set[str]:
    """[`default_targets`] in the blocks that a config's `layers_to_transform` names: of a full name, as they are where
    a part of one would fit other modules, PEFT does not ask in which block it is.

    Raises:
        ValueError: if the model has no repeated blocks, or none of these.
    """
    targets = default_targets(model)
    full_names = targets & block_linears(model).keys()
    if config.layers_to_transform is None or not full_names:
        return targets
    by_end = copy.copy(config)
    by_end.target_modules = {name.rpartition(".")[2] for name in full_names}
    chosen = {name for name in full_names if check_target_module_exists(by_end, name)}
    if not chosen:
        raise ValueError(
            f"`layers_to_transform` has indices of blocks that hold default targets, got {config.layers_to_transform} "
            f"(layers_pattern={config.layers_pattern!r}) for linears such as `{min(full_names)}`; mend them, or name "
            "the linears in `target_modules`."
        )
    return chosen


def targets_by_name(model: nn.Module, is_target: Callable[[str], Any]) -> dict[str, nn.Module]:
    """The modules that are meant, by full name, but none inside of a tuner layer.

    Args:
        is_target: whether a config means this full name.
    """
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {name: m for name, m in modules.items() if name and not name.startswith(inside) and is_target(name)}


def check_linear(name: str, module: nn.Module, tuner: str, layer_cls: type, linears: str) -> None:
    """Raises:
    ValueError: if a tuner, whose layers are of this class and adapt `linears`, cannot adapt a module."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, layer_cls):
        raise ValueError(
            f"{tuner} adapts plain linears, got `{name}`, which carries an adapter of another "
            f"method ({type(module).__module__}.{type(module).__qualname__}); merge that adapter first."
        )
    if not isinstance(module, BaseTunerLayer) and not is_linear(module):
        raise ValueError(
            f"{tuner} adapts {linears}, got {type(module).__name__} in `{name}`{_odd_about(module)}; take it out of "
            "`target_modules`, or exclude it with `exclude_modules`."
        )
    if not isinstance(module, BaseTunerLayer) and _has_own_forward(module):
        way_out = "give it its own again (`del module.forward`), do that work in a hook, or exclude it with "
        way_out += "`exclude_modules`"
        if "parallel" in getattr(module.forward, "__module__", ""):  # of transformers, where a process has a part of W
            way_out = "load the model without `tp_plan`, and train it on several devices with FSDP"
        raise ValueError(
            f"{tuner} adapts linears that compute x W^T + b, got `{name}`, whose `forward` was replaced by "
            f"{module.forward!r}, which an adapter would compute without; {way_out}."
        )
    if not isinstance(module, BaseTunerLayer):
        check_own_weight(name, module)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a linear was given a forward of its own. That of accelerate calls the one of the class."""
    return forward_replaced(module) and not hasattr(module, "_hf_hook")


def _odd_about(module: nn.Module) -> str:
    if is_foreign(module):
        return ", quantised in a way that is not read here"
    odd = isinstance(module, nn.Linear) and not computes_linear(module)
    return ", whose own forward is not x W^T + b" if odd else ""


def check_alone(targets: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raises:
    ValueError: if another module computes with the weight of a target, given by full name."""
    not_called, shared = linears_not_called(model), shared_weights(model)
    for name, module in targets.items():
        if name in not_called:
            raise ValueError(
                f"An adapter works where its linear is called, got `{name}`, whose weight {not_called[name]} "
                "takes without calling it; leave it out of `target_modules`, or exclude it with `exclude_modules`."
            )
        if others := shared.get(unwrap(module)):
            raise ValueError(
                f"An adapter changes the weight of its linear alone, got `{name}`, whose weight is also that of "
                f"`{next(iter(others))}`, which merging would change too; exclude it with `exclude_modules`, or "
                f"{_UNTIE}."
            )


def _ends_with(full: str, name: str) -> bool:
    return f".{full}".endswith(f".{name}")
