"""The weights of a model's linears by name, read one at a time: from memory as the forward uses them, or from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_sparse.evaluation.forward_weight import forward_weight
from peft_sparse.linears import (
    as_stored,
    block_experts,
    block_linears,
    linears_inside,
    not_read,
    storage_key,
    unwrap,
    weight_parameter,
    weights_loaded,
)
from peft_sparse.sparsity import pack_mask, unpack_mask
from peft_sparse.storage import CONFIG_KEY, PRUNING, StoredLinear, StoredModel, as_in_files, locate, open_model

Linears = Mapping[str, nn.Module | None]
Part = TypeVar("Part", nn.Module, nn.Parameter)


@dataclass
class LinearWeights:
    """The weights that are counted, and the tensors that are not.

    Attributes:
        names: full names of the linears, in the model's order.
        read: gives the weight of one, (out, in).
        outside: gives the other tensors, one after the other.
        linears: the modules behind the names, None behind an expert's; None if a folder did not tell which of its
            tensors are linears.
        errors: of the outputs that pruning left, by name, as the model's config tells them.
        notes: what a reader has to know.
    """

    names: list[str]
    read: Callable[[str], torch.Tensor]
    outside: Callable[[], Iterator[torch.Tensor]]
    linears: Linears | None
    errors: dict[str, float]
    notes: list[str] = field(default_factory=list)


def linear_weights(
    source: nn.Module | str | Path | StoredModel | LinearWeights, linears: Linears | None = None
) -> LinearWeights:
    """Find the linears of the transformer blocks; all linears of a model without blocks. Experts that are one
    parameter for all of them are taken apart, as they are on disk.

    Args:
        source: a model, adapters included; a folder with safetensors, dense or packed; or a repository on the Hub.
            What was found already is handed back.
        linears: for a folder that does not tell which of its tensors are linears: those of a like model, by name.

    Raises:
        ValueError: if there is no linear, nothing that can be read, or an adapter on parameters (`target_parameters`);
            or, when it is read, a weight was never loaded.
    """
    if isinstance(source, LinearWeights):
        return source
    if not isinstance(source, nn.Module):
        return _stored(source if isinstance(source, StoredModel) else open_model(locate(source)), linears)
    # Names without the prefix that PEFT puts before them.
    get_base_model = getattr(source, "get_base_model", None)
    model: nn.Module = get_base_model() if get_base_model is not None else source
    _check_parameters_alone(model)
    found, experts = _in_use(model, block_linears(model) or linears_inside(model)), _experts(model)
    if not found and not experts:
        kind = type(model).__name__
        raise ValueError(f"A sparsity report needs at least one linear, got none in {kind}{not_read(model)}.")

    @lru_cache(maxsize=1)  # its experts come one after the other, and may be far away
    def stored_parts(parameter: str) -> dict[str, torch.Tensor]:
        return _in_files(model, parameter)

    def read(name: str) -> torch.Tensor:
        if name not in experts:
            return _loaded(name, forward_weight(found[name]))
        parameter, key = experts[name]
        return _as_matrix(stored_parts(parameter)[key])

    return LinearWeights(
        names=[*found, *experts],
        read=read,
        outside=lambda: _outside(model, found),
        linears=found | dict.fromkeys(experts),
        errors=_pruning_errors(getattr(getattr(model, "config", None), CONFIG_KEY, None)),
    )


def _check_parameters_alone(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "parameter_name"):  # PEFT's `target_parameters`
            raise ValueError(
                f"A report reads linears and experts, got an adapter on the parameter `{name}.{module.parameter_name}`"
                ", which stands between it and the experts; `merge_and_unload()` first."
            )


def kept_weights(model: nn.Module) -> LinearWeights:
    """Which weights of a model's linears are not zero now, True for those. A bit a weight is kept, so that the model
    can be merged into and then be compared with what it was."""
    now = linear_weights(model)
    masks = {}
    for name in now.names:
        weight = now.read(name)
        masks[name] = pack_mask(weight != 0), weight.shape[1]
    return replace(now, read=lambda name: unpack_mask(*masks[name]), outside=lambda: iter(()))


def _loaded(name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.is_meta:
        raise ValueError(
            f"A report reads the weights of a model, got `{name}`, which is on the meta device (never loaded); load "
            "the model with its weights. What accelerate's hooks keep in CPU memory or on disk is fine."
        )
    return weight


def _in_use(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Linears or parameters by the names that they have without PEFT's wrappers; of modules that an adapter trains
    whole (`modules_to_save`), those that the forward uses."""
    found = dict(parts)
    for path, (used, unused) in _wrapped_modules(model).items():
        found = {
            path + name.removeprefix(used) if f"{name}.".startswith(f"{used}.") else name: part
            for name, part in found.items()
            if not f"{name}.".startswith(unused)
        }
    return found


def _wrapped_modules(model: nn.Module) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By the full name of PEFT's wrapper of a module that is trained whole: the full name of what its forward uses,
    the module or an adapter's copy of it, and those of the others, each with a dot behind."""
    found = {}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            names, active = list(wrapper.modules_to_save), wrapper.active_adapters
            trained = bool(active) and not wrapper.disable_adapters and set(active) <= set(names)
            used = f"{path}.modules_to_save.{active[0]}" if trained else f"{path}.original_module"
            there = [f"{path}.original_module", *(f"{path}.modules_to_save.{name}" for name in names)]
            found[path] = used, tuple(f"{other}." for other in there if other != used)
    return found


def _experts(model: nn.Module) -> dict[str, tuple[str, str]]:
    """By name: the parameter that an expert is a part of, and the tensor that the part is in files."""
    return {
        key.removesuffix(".weight"): (name, key)
        for name, parameter in _in_use(model, block_experts(model)).items()
        for key in sorted(as_in_files(model, name, parameter.detach().to("meta")))
    }


def _in_files(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The parts of a parameter as files have them, by their names there, wherever it is kept."""
    with weights_loaded(model.get_submodule(name.rpartition(".")[0]), recurse=False) as was_sharded:
        parts = as_in_files(model, name, model.get_parameter(name).detach())
        return {key: part.clone() for key, part in parts.items()} if was_sharded else parts


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1, weight.shape[-1])


def _outside(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[torch.Tensor]:
    tuner_layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = {id(parameter) for layer in tuner_layers for parameter in layer.parameters()}
    adapters -= {id(parameter) for layer in tuner_layers for parameter in unwrap(layer).parameters()}
    seen = adapters | {id(parameter) for parameter in block_experts(model).values()}
    seen |= {id(weight_parameter(unwrap(linear))) for linear in linears.values()}
    unused = tuple(start for _, others in _wrapped_modules(model).values() for start in others)
    for path, module in model.named_modules():
        if f"{path}.".startswith(unused):
            continue
        own = []
        for name, parameter in module.named_parameters(recurse=False):
            key = storage_key(model, f"{path}.{name}".lstrip("."), parameter)
            if id(parameter) not in seen and key not in seen:
                own.append(name)
                seen.add(key)
        if own:
            with weights_loaded(module, recurse=False):
                yield from (module.get_parameter(name) for name in own)


def _stored(model: StoredModel, linears: Linears | None) -> LinearWeights:
    _check_not_quantised(model)
    tensors, notes = model.tensors, []
    found = model.linears() or _named_as(linears or {}, model)
    told = bool(found)
    if not told:
        notes.append(
            "config.json does not tell which of these are linears: every 2-D tensor is listed, embeddings included, "
            "in the orientation in which it is stored"
        )
        keys = [key for key, tensor in tensors.items() if len(tensor.shape) == 2 and tensor.dtype.is_floating_point]
        found = {key.removesuffix(".weight"): StoredLinear(key, None) for key in keys}
    if not found:
        raise ValueError(f"A sparsity report needs at least one linear, got none in {str(model.folder)!r}.")

    def read(name: str) -> torch.Tensor:
        key, module = found[name]
        weight = tensors[key].read()
        return _as_matrix(weight) if module is None else as_stored(module, weight)

    def outside() -> Iterator[torch.Tensor]:
        counted = {linear.key for linear in found.values()}
        return (tensor.read() for key, tensor in tensors.items() if key not in counted)

    modules = {name: linear.module for name, linear in found.items()} if told else None
    return LinearWeights(list(found), read, outside, modules, _pruning_errors(model.config.get(CONFIG_KEY)), notes)


def _check_not_quantised(model: StoredModel) -> None:
    """Codes and scales are no weights, and where they are the only tensors by a linear's name, they would be counted.
    compressed-tensors says in the same place that weights are sparse, which are read."""
    found = model.config.get("quantization_config") or {}
    method = found.get("quant_method", "somebody") if isinstance(found, dict) else "somebody"
    if found and (method != "compressed-tensors" or found.get("config_groups")):
        way_out = "load the model with transformers and pass it instead"
        if method != "bitsandbytes":
            way_out = "read the model before it is quantised"
        raise ValueError(
            f"A folder's weights are read as they are stored, got {str(model.folder)!r}, where {method} has "
            f"quantised them; {way_out}."
        )


def _named_as(linears: Linears, model: StoredModel) -> dict[str, StoredLinear]:
    """The linears of a folder whose tensors are called as those of a like model are, a weight that several have as
    that of one of them; none if one is missing."""
    stored = [name for name in linears if f"{name}.weight" in model.tensors]
    holders = {id(weight_parameter(unwrap(linear))): name for name in stored if (linear := linears[name]) is not None}
    found = {}
    for name, linear in linears.items():
        module = None if linear is None else unwrap(linear)
        holder = name if name in stored or module is None else holders.get(id(weight_parameter(module)), name)
        if holder not in stored:
            return {}
        found[name] = StoredLinear(f"{holder}.weight", module)
    return found


def _pruning_errors(entry: Any) -> dict[str, float]:
    """||X W_new^T - X W^T|| / ||X W^T|| on the calibration data by full name, as the pruner wrote it into the config;
    empty where nothing was measured."""
    facts = entry.get(PRUNING) if isinstance(entry, dict) else None
    errors = facts.get("errors") if isinstance(facts, dict) else None
    return dict(errors) if isinstance(errors, dict) else {}
