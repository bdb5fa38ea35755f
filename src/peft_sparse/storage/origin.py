"""What is known about a model, whichever way its weights are stored: `model.config.peft_sparse`.

    pruning       how it was pruned, see pruning/metadata.py
    base_model    what it was made from, a name on the Hub
    method        by which it was tuned, "pst" or "spp"

`save_pretrained` and `save_sparse` write it into config.json, and both ways to load read it, so that the card of a
model that was saved and loaded on the way still says where it is from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

CONFIG_KEY = "peft_sparse"
PRUNING, BASE_MODEL, METHOD = "pruning", "base_model", "method"


def facts_of(entry: Any) -> dict[str, Any]:
    """The part of a config's entry `peft_sparse` that is about the model itself, and not about how it is stored."""
    kept = (PRUNING, BASE_MODEL, METHOD)
    return {key: entry[key] for key in kept if key in entry} if isinstance(entry, dict) else {}


def record_facts(model: nn.Module, **facts: Any) -> None:
    """Write facts into the config of a model of transformers; those that are None are not known. Beside them, what the
    model was loaded from, if nothing says so yet. The config of another model, a dictionary or a frozen object, is its
    own business."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    found = getattr(config, CONFIG_KEY, None)
    known = found if isinstance(found, dict) else {}
    base = known.get(BASE_MODEL) or hub_name(getattr(model, "name_or_path", None))
    new = {BASE_MODEL: base} | facts
    setattr(config, CONFIG_KEY, known | {key: value for key, value in new.items() if value is not None})


def own_name(name: str) -> str:
    """The full name of a module without the wrappers of `torch.compile`, which are not there after a reload.

    Examples:
        >>> own_name("_orig_mod.layers.0._orig_mod.up_proj")
        'layers.0.up_proj'
    """
    return name.replace("_orig_mod.", "")


def hub_name(name: str | None) -> str | None:
    """`name` if it can be a model on the Hub and is no folder here.

    Examples:
        >>> hub_name("owner/name"), hub_name("name"), hub_name("./some/folder"), hub_name(None)
        ('owner/name', None, None, None)
    """
    fits = name is not None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if fits else None
