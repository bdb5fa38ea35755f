"""A model from wherever it is: dense or packed, a folder or the Hub, alone or as an adapter on its base."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig

from peft_sparse.checkpoint.labels import labels_of_head, named_labels
from peft_sparse.checkpoint.load import load_sparse
from peft_sparse.checkpoint.lookup import adapter_settings, base_of_adapter, check_source, is_adapter
from peft_sparse.pruning.checks import padding_of_positions
from peft_sparse.pruning.token_inputs import vocabulary_size
from peft_sparse.storage import open_model

# task: transformers' class for it, and PEFT's task type
TASKS = {
    "causal_lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "sequence_classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
}


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
    model_cls: Any = auto_class("sequence_classification") if task is None else auto_class(task)
    try:
        if stored_packed:
            changes = dict(config or {})
            return load_sparse(
                source,
                packed=packed,
                dtype=dtype,
                model_cls=None if task is None else auto_class(task),
                ignore_mismatched_sizes=changes.pop("ignore_mismatched_sizes", False),
                config=changes,
                trust_remote_code=trust_remote_code,
                on_missing=on_missing,
            )
        arguments: dict[str, Any] = dict(config or {}) | ({"dtype": dtype} if dtype else {})
        if gguf_file is not None:
            arguments |= {"gguf_file": gguf_file}
            # Without it a model stays marked as quantised and cannot be saved; before 5.17 all are dequantised.
            if hasattr(transformers, "GgufConfig"):
                arguments |= {"quantization_config": transformers.GgufConfig(dequantize=True)}
        else:
            arguments |= {"use_safetensors": True}  # never a pickle from the Hub
        if task is None:
            model_cls = _class_of_config(source, trust_remote_code)
        model, info = model_cls.from_pretrained(
            source, trust_remote_code=trust_remote_code, output_loading_info=True, **arguments
        )
        missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        if missing and on_missing is not None:
            on_missing(missing)
        return model
    except TypeError as error:
        unknown = next((key for key in config or {} if f"'{key}'" in str(error)), None)
        if unknown is None:
            raise
        raise ValueError(
            f"`config` changes fields of a model's config, got {unknown!r}, which {str(source)!r} has not; check its "
            "config.json (in a recipe, the key in `model.config`)."
        ) from error
    except (OSError, ImportError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "ignore_mismatched_sizes" in reason:
            why = "its config.json is that of another model, or damaged."
            if "ForSequenceClassification" in model_cls.__name__:
                why = "its head has another number of labels. Ask for that number, or for a new head "
                why += "(`model.new_head` of a recipe)."
            raise ValueError(
                f"A model is loaded with the shapes that it was saved with, got others for {str(source)!r}: {why}"
            ) from error
        if reason.startswith("Unrecognized configuration class"):  # and then all that there are
            raise ValueError(
                f"A task is one that transformers has a class of the model for, got {task} for the model in "
                f"{str(source)!r}; name another one, or none where the class in config.json will do."
            ) from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"A model is a folder or a name on the Hub, got {str(source)!r}: {reason}") from error


def pad_as(model: Any, tokenizer: Any) -> None:
    """Tell a model the token that its tokenizer pads with. A decoder that classifies reads a row's last token that is
    another, and config.json may have a base's, or none. Where positions are counted from it, it stays."""
    token, size = tokenizer.pad_token_id, vocabulary_size(model)
    if token is not None and (size is None or token < size) and padding_of_positions(model) is None:
        model.config.pad_token_id = token


def task_of(source: str | Path, trust_remote_code: bool = False) -> str:
    """The key of `TASKS` that suits what a folder, or a name on the Hub, says of itself.

    Raises:
        ValueError: if there is no such model, or its class is for something else.
    """
    folder = check_source(source)
    if is_adapter(folder):
        return _trained_for(folder) or task_of(base_of_adapter(folder), trust_remote_code)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"A model's folder has a config.json, got {str(source)!r} without one; check the path.")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"A model is a folder or a name on the Hub, got {str(source)!r}: {reason}") from error
    for task in TASKS:
        if is_for(task, config):
            return task
    raise ValueError(
        f"A model without a task is of a class for one of {', '.join(TASKS)}, got "
        f"{(config.architectures or ['none'])[0]} in config.json of {str(source)!r}; name the task."
    )


def is_for(task: str, config: Any) -> bool:
    """Whether the class that a model's config names is one for a task."""
    name = (config.architectures or [""])[0]
    found = auto_class(task)._model_mapping.get(type(config), ())
    names = {cls.__name__ for cls in (found if isinstance(found, (list, tuple)) else (found,))}
    its_own_code = (getattr(config, "auto_map", None) or {}).get(TASKS[task][0], "")
    names.add(its_own_code.rpartition(".")[2])
    return bool(name) and name in names


def auto_class(task: str) -> Any:
    """transformers' Auto class for a task.

    Raises:
        ValueError: for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"`task` is one of {', '.join(TASKS)}, got {task!r}.")
    return getattr(transformers, TASKS[task][0])


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
    base = base or base_of_adapter(folder)
    trained = _trained_for(folder)
    if task and trained and task != trained:
        raise ValueError(f"An adapter is loaded for the task that it was trained for, {trained}, got {task!r}.")
    task = task or trained
    if task == "sequence_classification" and (labels := labels_of_head(folder)):
        if config.get("num_labels", labels) != labels:
            raise ValueError(
                f"A classifier has as many labels as its head, got num_labels={config['num_labels']} and a head for "
                f"{labels} beside the adapter in {str(folder)!r}; leave the number out."
            )
        # The adapter's head takes the place of the base's, whose number of labels may be another.
        names = adapter_settings(folder).get("labels") or []
        named = named_labels(names) if len(names) == labels else {}
        if names and not named:
            warnings.warn(
                f"`labels` of an adapter names each label of its head, got {len(names)} names and {labels} labels in "
                f"{str(folder)!r}, so they are left out; mend them in its adapter_config.json.",
                stacklevel=3,
            )
        config = {"num_labels": labels, "ignore_mismatched_sizes": True} | named | config
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
        warnings.warn(
            f"Neither {str(base)!r} nor the adapter in {str(folder)!r} has weights for {missing[:3]} ({len(missing)} "
            "in all), which are new and random.",
            stacklevel=3,
        )
    return model


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


def _trained_for(folder: Path) -> str | None:
    """The task of an adapter."""
    types = {task_type: task for task, (_, task_type) in TASKS.items()}
    return types.get(adapter_settings(folder).get("task_type") or "")
