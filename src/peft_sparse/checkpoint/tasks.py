"""The tasks that the command line and recipes know, and which of them a stored model is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from peft_sparse.checkpoint.lookup import adapter_settings, base_of_adapter, check_source, is_adapter

# task: transformers' class for it, and PEFT's task type
TASKS = {
    "causal_lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "sequence_classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
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
    found = auto_class(task)._model_mapping.get(type(config), ())
    names = {cls.__name__ for cls in (found if isinstance(found, (list, tuple)) else (found,))}
    its_own_code = (getattr(config, "auto_map", None) or {}).get(TASKS[task][0], "")
    names.add(its_own_code.rpartition(".")[2])
    return bool(name) and name in names


def task_of(source: str | Path, trust_remote_code: bool = False) -> str:
    """The key of `TASKS` that suits what a folder, or a name on the Hub, says of itself.

    Raises:
        ValueError: if there is no such model, or its class is for something else.
    """
    folder = check_source(source)
    if is_adapter(folder):
        return task_of_adapter(folder) or task_of(base_of_adapter(folder), trust_remote_code)
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


def task_of_adapter(folder: str | Path) -> str | None:
    """The key of `TASKS` that an adapter was trained for; None where its config names no such task."""
    by_type = {task_type: task for task, (_, task_type) in TASKS.items()}
    return by_type.get(adapter_settings(folder).get("task_type") or "")
