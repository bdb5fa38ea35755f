"""A model from wherever it is: dense or packed, a folder or the Hub, alone or as an adapter on its base."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig

from peft_sparse.checkpoint.complete import check_blocks
from peft_sparse.checkpoint.labels import labels_of_head, named_labels
from peft_sparse.checkpoint.load import load_sparse
from peft_sparse.checkpoint.lookup import (
    adapter_settings,
    base_of_adapter,
    check_method,
    check_source,
    is_adapter,
)
from peft_sparse.checkpoint.tasks import auto_class, task_of_adapter
from peft_sparse.pruning.checks import padding_of_positions
from peft_sparse.pruning.token_inputs import vocabulary_size
from peft_sparse.storage import open_model


def load_model(
    source: str | Path,
    task: str | None = None,
    *,
    dtype: str | None = None,
    packed: bool = False,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    config: dict[str, Any] | None = None,
    base: str | Path | None = None,
    on_missing: Callable[[list[str]], Any] | None = None,
) -> Any:
    """Load a model for one of the tasks that the command line and recipes know.

    Args:
        source: a folder, dense, packed or with an adapter, or a name on the Hub.
        task: a key of `TASKS`; None: the class that config.json names.
        dtype: such as "bfloat16"; None: as it was saved.
        packed: keep a packed checkpoint packed in memory.
        gguf_file: a file in that folder to read instead of safetensors; its weights are dequantised.
        trust_remote_code: run code that comes with the model.
        config: fields of the model's config to change, such as `num_labels`, and `ignore_mismatched_sizes` for a head
            of another shape, which is made anew.
        base: of an adapter; None: the one that its config names.
        on_missing: called with the full names of weights that are random, since there are none for them in the files
            (nor in the adapter's), if there are such. None: a warning tells them.

    Returns:
        A transformers model; a PeftModel for an adapter.

    Raises:
        ValueError: if there is no such model.
    """
    if dtype is not None and dtype not in ("auto", "float32", "float16", "bfloat16", "float64"):
        raise ValueError(f"`dtype` is float32, bfloat16, float16, float64 or auto, got {dtype!r}.")
    folder = Path(source)
    if is_adapter(folder):
        return _load_adapter(folder, base, task, dtype, packed, trust_remote_code, config or {}, on_missing)
    if base is not None:
        raise ValueError(f"A base belongs to an adapter, got {str(source)!r}, which has no adapter_config.json.")
    check_source(source)
    # also where there is nothing to read but a pickle, which is refused
    stored_packed = folder.is_dir() and gguf_file is None and open_model(folder).layout != "dense"
    if packed and not stored_packed:
        raise ValueError(
            f"`packed` keeps a packed checkpoint packed, got a dense one in {str(source)!r}; pack it first, with "
            "`peft-sparse pack`, or leave `packed` out."
        )
    model_cls = None if task is None else auto_class(task)
    try:
        if stored_packed:
            return _load_packed(source, model_cls, dtype, packed, trust_remote_code, config or {}, on_missing)
        if model_cls is None:
            model_cls = _class_of_config(source, trust_remote_code)
        return _load_dense(source, model_cls, dtype, gguf_file, trust_remote_code, config or {}, on_missing)
    except (TypeError, OSError, ImportError, KeyError, RuntimeError, ValueError) as error:
        explained = _explained(error, source, task, model_cls, config or {})
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


def _explained(
    error: Exception, source: str | Path, task: str | None, model_cls: Any, config: Mapping[str, Any]
) -> ValueError | None:
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
        if model_cls is None or "ForSequenceClassification" in model_cls.__name__:
            why = "its head has another number of labels. Ask for that number, or for a new head "
            why += "(`model.new_head` of a recipe)."
        return ValueError(
            f"A model is loaded with the shapes that it was saved with, got others for {str(source)!r}: {why}"
        )
    if reason.startswith("Unrecognized configuration class"):  # and then all that there are
        return ValueError(
            f"A task is one that transformers has a class of the model for, got {task} for the model in "
            f"{str(source)!r}; name another one, or none where the class in config.json will do."
        )
    if isinstance(error, ValueError):
        return None
    return ValueError(f"A model is a folder or a name on the Hub, got {str(source)!r}: {reason}")


def pad_as(model: Any, tokenizer: Any) -> None:
    """Tell a model the token that its tokenizer pads with. A decoder that classifies reads a row's last token that is
    another, and config.json may have a base's, or none. Where positions are counted from it, it stays."""
    token, size = tokenizer.pad_token_id, vocabulary_size(model)
    if token is not None and (size is None or token < size) and padding_of_positions(model) is None:
        model.config.pad_token_id = token


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


def _load_adapter(
    folder: Path,
    base: str | Path | None,
    task: str | None,
    dtype: str | None,
    packed: bool,
    trust_remote_code: bool,
    config: dict[str, Any],
    on_missing: Callable[[list[str]], Any] | None,
) -> nn.Module:
    check_method(folder)
    base = base or base_of_adapter(folder)
    trained = task_of_adapter(folder)
    if task and trained and task != trained:
        raise ValueError(f"An adapter is loaded for the task that it was trained for, {trained}, got {task!r}.")
    task = task or trained
    if task == "sequence_classification":
        config = _with_saved_head(folder, config)
    missing: list[str] = []
    with _without_report():
        loaded = load_model(
            base,
            task,
            dtype=dtype,
            packed=packed,
            trust_remote_code=trust_remote_code,
            config=config,
            on_missing=missing.extend,
        )
    model = PeftModel.from_pretrained(loaded, str(folder))
    modules = model.get_base_model().named_modules()
    in_adapter = tuple(f"{name}." for name, module in modules if isinstance(module, AuxiliaryTrainingWrapper))
    missing = [name for name in missing if not name.startswith(in_adapter)]
    if missing and on_missing is not None:
        on_missing(missing)
    elif missing:
        check_blocks(loaded, missing, base)
        warnings.warn(
            f"Neither {str(base)!r} nor the adapter in {str(folder)!r} has weights for {missing[:3]} ({len(missing)} "
            "in all), which are new and random.",
            stacklevel=3,
        )
    return model


def _with_saved_head(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a base's config to change, with those that make room for the head that an adapter was saved with:
    it takes the place of the base's, whose number of labels may be another.

    Raises:
        ValueError: if another number of labels is asked for.
    """
    labels = labels_of_head(folder)
    if not labels:
        return config
    if config.get("num_labels", labels) != labels:
        raise ValueError(
            f"A classifier has as many labels as its head, got num_labels={config['num_labels']} and a head for "
            f"{labels} beside the adapter in {str(folder)!r}; leave the number out."
        )
    names = adapter_settings(folder).get("labels") or []
    named = named_labels(names) if len(names) == labels else {}
    if names and not named:
        warnings.warn(
            f"`labels` of an adapter names each label of its head, got {len(names)} names and {labels} labels in "
            f"{str(folder)!r}, so they are left out; mend them in its adapter_config.json.",
            stacklevel=4,
        )
    return {"num_labels": labels, "ignore_mismatched_sizes": True} | named | config


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers reports as new and random, to be trained, what a base lacks, such as the head that its adapter has.
    What neither has is told after both are loaded."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
