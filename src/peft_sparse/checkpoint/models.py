"""A model from wherever it is: dense or packed, a folder or the Hub, alone or as an adapter on its base."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_sparse.checkpoint.base import load_base
from peft_sparse.checkpoint.complete import check_blocks
from peft_sparse.checkpoint.labels import labels_of_head, named_labels, rows_in_adapter
from peft_sparse.checkpoint.lookup import (
    adapter_settings,
    base_of_adapter,
    check_method,
    check_source,
    is_adapter,
)
from peft_sparse.checkpoint.tasks import auto_class, class_of_adapter, config_of, is_class_for, takes
from peft_sparse.pruning.checks import padding_of_positions
from peft_sparse.pruning.token_inputs import vocabulary_size


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
    model_cls = None if task is None else auto_class(task)
    return load_base(source, model_cls, dtype, packed, gguf_file, trust_remote_code, config or {}, on_missing)


def pad_as(model: Any, tokenizer: Any) -> None:
    """Tell a model the token that its tokenizer pads with. A decoder that classifies reads a row's last token that is
    another, and config.json may have a base's, or none. Where positions are counted from it, it stays."""
    token, size = tokenizer.pad_token_id, vocabulary_size(model)
    if token is not None and (size is None or token < size) and padding_of_positions(model) is None:
        model.config.pad_token_id = token


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
    model_cls = _class_for_adapter(folder, base, task, trust_remote_code)
    if model_cls is not None and "Classification" in model_cls.__name__:
        config = _with_saved_head(folder, config)
    missing: list[str] = []
    with _without_report():
        loaded = load_base(base, model_cls, dtype, packed, None, trust_remote_code, config, missing.extend)
    _resize_as_saved(loaded, folder)
    model = _with_adapter(loaded, folder, base)
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


def _class_for_adapter(folder: Path, base: str | Path, task: str | None, trust_remote_code: bool) -> Any:
    """The class to load the base of an adapter as, which it was trained on; None: the one that config.json names.

    Raises:
        ValueError: if a task is asked for that it was not trained for."""
    trained = class_of_adapter(folder)
    if task is not None:
        if trained is not None and not is_class_for(task, trained):
            raise ValueError(
                f"An adapter is loaded for its own task, {trained.__name__}, got {task!r}; leave the task out."
            )
        return auto_class(task)
    check_source(base)
    return trained if trained is not None and takes(trained, config_of(base, trust_remote_code)) else None


def _resize_as_saved(model: Any, folder: Path) -> None:
    """Give a base as many tokens as it had when its adapter was saved: after `resize_token_embeddings` PEFT saves the
    embeddings too, which take the place of the base's."""
    here = vocabulary_size(model)
    if here is None:
        return
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = rows_in_adapter(folder, f".{name}.weight")
    if rows not in (None, here):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _with_adapter(loaded: Any, folder: Path, base: str | Path) -> PeftModel:
    """Raises:
    ValueError: if the adapter has no weights for the places in the model where it would go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT goes on with random ones
        try:
            return PeftModel.from_pretrained(loaded, str(folder))
        except UserWarning as warning:
            if "missing adapter keys" not in str(warning):  # another one, which the user has made an error
                raise
            raise ValueError(
                f"An adapter is loaded on a model of the class that it was trained on, got "
                f"{type(loaded).__name__} from {str(base)!r}, whose layers have other names than the weights in "
                f"{str(folder)!r}; name the base that it was trained on, or `task`."
            ) from warning


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
