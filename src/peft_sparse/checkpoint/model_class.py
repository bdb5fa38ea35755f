"""The class that a stored model is loaded as: the one that was saved, or the one that is asked for."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from peft_sparse.storage import StoredModel
from peft_sparse.storage.model import transformers_class


def saved_class(stored: StoredModel, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class that a folder's config.json names.

    Raises:
        ValueError: if it is none of transformers', and code that the folder brings along is not to be run.
    """
    name = stored.architecture
    found = transformers_class(name)
    if found is not None:
        return found
    places = {auto: place for auto, place in _code(stored).items() if place.split(".")[-1] == name}
    if places and trust_remote_code:
        return _class_in_code(stored, next(iter(places)))
    code = ", or trust its own code (`--trust-remote-code`, `trust_remote_code=True`)" if places else ""
    way_out = 'write it there, as "architectures": ["LlamaForCausalLM"]'
    if stored.layout == "packed":  # whose config.json has a checksum
        way_out = "update transformers if it has the class in a newer version"
    raise ValueError(
        f"config.json names the class of the model, one of transformers', got {repr(name) if name else 'none'} in "
        f"{str(stored.folder)!r}; {way_out}, or in Python pass the class as `model_cls`{code}."
    )


def class_for(
    model_cls: Any, config: PreTrainedConfig, stored: StoredModel, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The class to load a stored model as: what an Auto class of transformers stands for; any other is itself.

    Raises:
        ValueError: if it is no class, or not one for a model with this config.
    """
    if not isinstance(model_cls, type):
        raise ValueError(
            f"`model_cls` is a class, such as transformers.AutoModelForCausalLM, got {model_cls!r}; pass the class "
            "itself, or None for the one that was saved."
        )
    mapping = getattr(model_cls, "_model_mapping", None)
    if mapping is not None and type(config) in mapping:
        found = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if mapping is not None and trust_remote_code and model_cls.__name__ in _code(stored):
        return _class_in_code(stored, model_cls.__name__)
    wanted = getattr(model_cls, "config_class", None)
    # The code that a folder brings along may have made two classes of one.
    fits = wanted is None or isinstance(config, wanted) or wanted.model_type == config.model_type
    if mapping is not None or not fits:
        raise ValueError(
            f"`model_cls` is a class for the stored model, whose config is a {type(config).__name__}, got "
            f"{model_cls.__name__}; pass another one, or None for the one that was saved."
        )
    return model_cls


def _code(stored: StoredModel) -> dict[str, str]:
    """By Auto class, the classes in the code that a folder brings along."""
    code = stored.config.get("auto_map")
    return {auto: place for auto, place in code.items() if isinstance(place, str)} if isinstance(code, dict) else {}


def _class_in_code(stored: StoredModel, auto_class: str) -> type[PreTrainedModel]:
    found = get_class_from_dynamic_module(_code(stored)[auto_class], str(stored.folder))
    found.register_for_auto_class(auto_class)  # so that its code is saved with it
    return found
