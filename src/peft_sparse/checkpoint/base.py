"""A model without an adapter: a dense or packed folder, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from peft_sparse.checkpoint.complete import check_blocks
from peft_sparse.checkpoint.load import load_sparse
from peft_sparse.checkpoint.tasks import TASKS
from peft_sparse.storage import open_model


def load_base(
    source: str | Path,
    model_cls: Any,
    dtype: str | None,
    packed: bool,
    gguf_file: str | None,
    trust_remote_code: bool,
    config: Mapping[str, Any],
    on_missing: Callable[[list[str]], Any] | None,
) -> Any:
    """Load a model for [`load_model`], whose arguments these are.

    Args:
        model_cls: of transformers; None: the class that config.json names.

    Raises:
        ValueError: if there is no such model.
    """
    # also where there is nothing to read but a pickle, which is refused
    stored_packed = Path(source).is_dir() and gguf_file is None and open_model(Path(source)).layout != "dense"
    if packed and not stored_packed:
        raise ValueError(
            f"`packed` keeps a packed checkpoint packed, got a dense one in {str(source)!r}; pack it first, with "
            "`peft-sparse pack`, or leave `packed` out."
        )
    try:
        if stored_packed:
            return _load_packed(source, model_cls, dtype, packed, trust_remote_code, config, on_missing)
        if model_cls is None:
            model_cls = _class_of_config(source, trust_remote_code)
        return _load_dense(source, model_cls, dtype, gguf_file, trust_remote_code, config, on_missing)
    except (TypeError, OSError, ImportError, KeyError, RuntimeError, ValueError) as error:
        explained = _explained(error, source, model_cls, config)
        if explained is None:
            raise
        raise explained from error


def _load_packed(
    source: str | Path,
    model_cls: Any,
    dtype: str | None,
    packed: bool,
    trust_remote_code: bool,
    config: Mapping[str, Any],
    on_missing: Callable[[list[str]], Any] | None,
) -> Any:
    changes = dict(config)
    return load_sparse(
        source,
        packed=packed,
        dtype=dtype,
        model_cls=model_cls,
        ignore_mismatched_sizes=changes.pop("ignore_mismatched_sizes", False),
        config=changes,
        trust_remote_code=trust_remote_code,
        on_missing=on_missing,
    )


def _load_dense(
    source: str | Path,
    model_cls: Any,
    dtype: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
    config: Mapping[str, Any],
    on_missing: Callable[[list[str]], Any] | None,
) -> Any:
    arguments: dict[str, Any] = dict(config) | ({"dtype": dtype} if dtype else {})
    if gguf_file is None:
        arguments |= {"use_safetensors": True}  # never a pickle from the Hub
    else:
        arguments |= {"gguf_file": gguf_file}
        # Without it a model stays marked as quantised and cannot be saved; before 5.17 all are dequantised.
        if hasattr(transformers, "GgufConfig"):
            arguments |= {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model, info = model_cls.from_pretrained(
        source, trust_remote_code=trust_remote_code, output_loading_info=True, **arguments
    )
    missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if on_missing is None:
        check_blocks(model, missing, source)
    elif missing:
        on_missing(missing)
    return model


def _explained(error: Exception, source: str | Path, model_cls: Any, config: Mapping[str, Any]) -> ValueError | None:
    """What an error of a load means for who asked for the model; None where the error says so itself.

    Args:
        model_cls: that was loaded; None: the one that a packed folder names.
        config: fields that were to be changed.
    """
    if isinstance(error, TypeError):
        unknown = next((key for key in config if f"'{key}'" in str(error)), None)
        if unknown is None:
            return None
        return ValueError(
            f"`config` changes fields of a model's config, got {unknown!r}, which {str(source)!r} has not; check its "
            "config.json (in a recipe, the key in `model.config`)."
        )
    reason = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in reason:
        why = "its config.json is that of another model, or damaged."
        if model_cls is None or "Classification" in model_cls.__name__:
            why = "its head has another number of labels. Ask for that number, or for a new head "
            why += "(`model.new_head` of a recipe)."
        return ValueError(
            f"A model is loaded with the shapes that it was saved with, got others for {str(source)!r}: {why}"
        )
    if reason.startswith("Unrecognized configuration class"):  # and then all that there are
        task = next((task for task, (auto, _) in TASKS.items() if auto == model_cls.__name__), model_cls.__name__)
        return ValueError(
            f"A task is one that transformers has a class of the model for, got {task} for the model in "
            f"{str(source)!r}; name another one, or none where the class in config.json will do (a recipe "
            "tunes causal language models and classifiers alone; tune others in Python)."
        )
    if isinstance(error, ValueError):
        return None
    return ValueError(f"A model is a folder or a name on the Hub, got {str(source)!r}: {reason}")


def _class_of_config(source: str | Path, trust_remote_code: bool) -> Any:
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if found is None and not trust_remote_code:
        raise ValueError(
            f"config.json names the class of the model, one of transformers', got {name!r} in {str(source)!r}; name a "
            "task instead."
        )
    return found or transformers.AutoModelForCausalLM
