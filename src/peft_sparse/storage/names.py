"""What a tensor is called in a model's files and in the model: transformers renames some while it loads or saves.

ViT, LLaVA and others keep the names of older versions on disk; a base model's tensors lack the prefix that they have
in a model with a head; experts are stored one by one, and are one parameter in memory. All of it is transformers' own
business, and asked of transformers here, so that files can be read without loading the model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

_CAUSAL_MASKS = {f"{module}.{mask}" for module in ("attn", "attention") for mask in ("bias", "masked_bias")}


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For each tensor of a file that the model wants: its name in the model's state dict, and whether it is computed
    on the way there, with other tensors of the file.

    Args:
        model: may be on the meta device.
        keys: names in the file.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with torch.device("meta"):
        ...     model = GPT2LMHeadModel(GPT2Config(n_layer=1))
        >>> names_in_model(model, ["h.0.attn.c_attn.weight", "something.else"])
        {'h.0.attn.c_attn.weight': ('transformer.h.0.attn.c_attn.weight', False)}
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    found = {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], prefix, state)
        if name in state:
            found[key] = name, converter is not None
    return found


def without_place(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """The tensors of a file that a model does not take, but for what it makes anew, as files of older versions have
    it for each layer: buffers such as the frequencies of rotary embeddings, and causal masks."""
    keys = list(keys)
    taken, buffers = names_in_model(model, keys), {_end(name) for name, _ in model.named_buffers()}
    return sorted(key for key in keys if key not in taken and _end(key) not in buffers | _CAUSAL_MASKS)


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def as_in_files(model: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor of a model as its files have it, by their names: several if it is computed from several. Views."""
    return revert_weight_conversion(model, {name: tensor}) if isinstance(model, PreTrainedModel) else {name: tensor}
