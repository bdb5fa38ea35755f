"""Whether a checkpoint has what a model needs: a head may be new, a weight of the transformer blocks may not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_sparse.checkpoint.lookup import is_adapter
from peft_sparse.linears import find_block_lists
from peft_sparse.storage import StoredModel, locate_companions, names_in_model, open_model, without_place

# What the error says where the shapes of files and model differ; `load_model` says it in its own words.
NEW_HEAD = "`ignore_mismatched_sizes=True`"


def check_shapes(
    model_cls: type[PreTrainedModel], config: PreTrainedConfig, stored: StoredModel, ignore_mismatched_sizes: bool
) -> None:
    """Before memory is asked for: a config.json that nobody has verified may describe a model of any size.

    Raises:
        ValueError: if a tensor has another shape in the files than in the model."""
    with torch.device("meta"):
        model = model_cls(config)
    state, inside = model.state_dict(), _inside(model)
    for key, (name, converted) in names_in_model(model, stored.tensors).items():
        shape, expected = stored.tensors[key].shape, tuple(state[name].shape)
        new = ignore_mismatched_sizes and not name.startswith(inside)
        if not converted and shape != expected and not new:
            raise ValueError(
                f"A packed checkpoint has the tensors of its model, got `{key}` of {shape}, which is {expected} by "
                f"config.json, in {str(stored.folder)!r}; put the config.json back that was saved with it, or have a "
                f"head of another shape made anew with {NEW_HEAD}."
            )


def check_complete(
    model: PreTrainedModel,
    stored: StoredModel,
    info: dict[str, Any],
    ignore_mismatched_sizes: bool,
    on_missing: Callable[[list[str]], Any] | None,
    stacklevel: int,
) -> None:
    """Tells of what is new in the model.

    Args:
        info: what transformers tells of the load.
        ignore_mismatched_sizes: a tensor of another shape may be new, too.
        on_missing: called with the names of what is new; None: a warning names them.
        stacklevel: of the warning, counted from here.

    Raises:
        ValueError: if the checkpoint is not that of this model. A class other than the one that was saved may have a
            new head, and no use for the old one; so may a dense checkpoint, which nobody has checked.
    """
    missing, unexpected = (sorted(info.get(f"{kind}_keys") or []) for kind in ("missing", "unexpected"))
    differing = info.get("mismatched_keys") or []
    shapes = {name: f"{name} ({tuple(saved)}, here {tuple(wanted)})" for name, saved, wanted in differing}
    mismatched, inside, cls = sorted(shapes), _inside(model), type(model).__name__
    new = []
    if cls != stored.architecture or stored.layout == "dense":
        unexpected = []
        if not any(name.startswith(inside) for name in missing):
            new, missing = missing, []
    if ignore_mismatched_sizes and not any(name.startswith(inside) for name in mismatched):
        new, mismatched = sorted(new + mismatched), []
    way_out = "it is damaged, or config.json is that of another model"
    if mismatched and not any(name.startswith(inside) for name in mismatched):
        way_out = (
            "config.json is that of another model, or tells another number of labels; give that in `config`, as "
            f"{{'num_labels': 2}}, or have a head of another shape made anew with {NEW_HEAD}"
        )
    found = {"missing": missing, "unexpected": unexpected, "mismatched": [shapes[name] for name in mismatched]}
    for kind, names in found.items():
        if names:
            raise ValueError(
                f"A checkpoint has exactly the tensors of its model, got {kind} keys {names[:3]} ({len(names)} in "
                f"all) for {cls} in {str(stored.folder)!r}; {way_out}."
            )
    if new and on_missing is not None:
        on_missing(new)
    elif new:
        other = f"loaded as {cls}" if cls != stored.architecture else "loaded with another head"
        warnings.warn(
            f"{str(stored.folder)!r} holds a {stored.architecture or 'model'}, {other}: what only this has is "
            f"new and random, and has to be trained: {new[:3]} ({len(new)} in all).",
            stacklevel=stacklevel + 1,
        )


def left_out(model: PreTrainedModel, stored: StoredModel) -> list[str]:
    """The stored tensors that a model which is saved again has not, with a warning that names them. transformers
    passes over some in silence, such as the layers for multi-token prediction of DeepSeek-V3."""
    names = without_place(model, stored.tensors)
    if names:
        size = sum(stored.tensors[name].nbytes for name in names)
        warnings.warn(
            f"{type(model).__name__} of transformers has no place for tensors in {str(stored.folder)!r} "
            f"({len(names)}, {size / 1e6:,.2f} MB), so they are left out of the result: {', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}. The model computes nothing with them; keep the source for a "
            "program that does.",
            stacklevel=3,
        )
    return names


def left_out_of(model: PreTrainedModel, source: str | Path, new_class: bool = False) -> list[str]:
    """[`left_out`] for a model that transformers has loaded from a folder, or a name on the Hub.

    Args:
        new_class: the model may be of another class than the one that was saved on purpose, such as a classifier: then
            the head that it has no place for is nothing to tell of.
    """
    config: Any = model.config
    quantised = getattr(config, "quantization_config", None) is not None  # names of codes are the quantiser's
    if quantised or (new_class and type(model).__name__ not in (getattr(config, "architectures", None) or [])):
        return []
    folder = locate_companions(source)  # the weights that it has downloaded lie there too
    if is_adapter(folder) or not any(folder.glob("*.safetensors")):
        return []
    return left_out(model, open_model(folder))


def check_blocks(model: nn.Module, missing: Iterable[str], source: str | Path) -> None:
    """For what transformers has loaded, which makes up what is missing.

    Raises:
        ValueError: if a weight of the blocks is missing in the files."""
    inside = _inside(model)
    made_up = [name for name in missing if name.startswith(inside)]
    if made_up:
        raise ValueError(
            f"A checkpoint has all weights of its model's transformer blocks, got none for {made_up[:3]} "
            f"({len(made_up)} in all) in {str(source)!r}, which would be random; it is damaged, or config.json is "
            "that of another model."
        )


def _inside(model: nn.Module) -> tuple[str, ...]:
    """What the names of the tensors of the blocks begin with."""
    return tuple(f"{block_list.name}." for block_list in find_block_lists(model))
