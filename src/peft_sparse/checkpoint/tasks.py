"""The tasks that the command line and recipes know, and which of them a stored model is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from peft_sparse.checkpoint.lookup import adapter_settings, base_of_adapter, check_source, is_adapter
from peft_sparse.storage.model import transformers_class

# task: transformers' class for it, and PEFT's task type
TASKS = {
    "causal_lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "sequence_classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
}
# PEFT's task types, and the class of transformers that a base is loaded as.
_CLASSES = {
    **{task_type: name for name, task_type in TASKS.values()},
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def auto_class(task: str) -> Any:
    """transformers' Auto class for a task.

    Raises:
        ValueError: for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"`task` is one of {', '.join(TASKS)}, got {task!r}.")
    return getattr(transformers, TASKS[task][0])


def is_for(task: str, config: Any) -> bool:
    """Whether the class that a model's config names is one for a task."""
    name = (config.architectures or [""])[0]
    return bool(name) and name in _classes_for(auto_class(task), config)


def takes(model_cls: Any, config: Any) -> bool:
    """Whether a class of transformers, or what an Auto class stands for, can be that of a model with a config."""
    return not hasattr(model_cls, "_model_mapping") or bool(_classes_for(model_cls, config))


def _classes_for(auto: Any, config: Any) -> set[str]:
    """The names of the classes that an Auto class stands for, with a model's config."""
    found = auto._model_mapping.get(type(config), ())
    names = {cls.__name__ for cls in (found if isinstance(found, (list, tuple)) else (found,))}
    its_own_code = (getattr(config, "auto_map", None) or {}).get(auto.__name__, "")
    return (names | {its_own_code.rpartition(".")[2]}) - {""}


def task_of(source: str | Path, trust_remote_code: bool = False) -> str:
    """The key of `TASKS` that suits what a folder, or a name on the Hub, says of itself.

    Raises:
        ValueError: if there is no such model, or its class is for something else.
    """
    folder = check_source(source)
    if is_adapter(folder):
        return _task_of_adapter(folder) or task_of(base_of_adapter(folder), trust_remote_code)
    config = config_of(source, trust_remote_code)
    for task in TASKS:
        if is_for(task, config):
            return task
    raise ValueError(
        f"A model without a task is of a class for one of {', '.join(TASKS)}, got "
        f"{(config.architectures or ['none'])[0]} in config.json of {str(source)!r}; name the task."
    )


def config_of(source: str | Path, trust_remote_code: bool) -> Any:
    """The config of a folder, or a name on the Hub.

    Raises:
        ValueError: if there is none."""
    folder = check_source(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"A model's folder has a config.json, got {str(source)!r} without one; check the path.")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"A model is a folder or a name on the Hub, got {str(source)!r}: {reason}") from error


def class_of_adapter(folder: str | Path) -> Any:
    """The class that the base of an adapter was loaded as: the Auto class of its task type or, where it has none, the
    class of transformers that PEFT noted. None where its config says neither."""
    settings = adapter_settings(folder)
    task_type, noted = settings.get("task_type"), settings.get("auto_mapping")
    if task_type in _CLASSES:
        return getattr(transformers, _CLASSES[task_type])
    if isinstance(noted, dict) and str(noted.get("parent_library")).startswith("transformers."):
        return transformers_class(str(noted.get("base_model_class")))
    return None


def is_class_for(task: str, model_cls: Any) -> bool:
    """Whether a class of transformers, or an Auto class, is for a task."""
    auto, name = auto_class(task), model_cls.__name__
    classes = auto._model_mapping._model_mapping.values()  # their names, without importing them all
    return model_cls is auto or any(name in ((found,) if isinstance(found, str) else found) for found in classes)


def _task_of_adapter(folder: str | Path) -> str | None:
    """The key of `TASKS` that an adapter was trained for; None where its config does not tell.

    Raises:
        ValueError: if that is another task."""
    trained = class_of_adapter(folder)
    if trained is None:
        return None
    for task in TASKS:
        if is_class_for(task, trained):
            return task
    raise ValueError(
        f"What is measured here is a model for {', '.join(TASKS)}, got an adapter for {trained.__name__} in "
        f"{str(folder)!r}; merge it, and measure the merged model in a script."
    )
