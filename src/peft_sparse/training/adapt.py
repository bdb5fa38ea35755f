"""The adapter of a recipe, with which everything comes back that was trained.

A base model may lack more than the head that PEFT saves: DeBERTa's classifier has a pooler that no checkpoint holds,
and a BERT from masked language modelling comes without one. Such weights are random, in another way at every load. So
the modules that hold them are trained and saved with the adapter, as a new head is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.checkpoint.tasks import TASKS
from peft_sparse.linears import block_linears
from peft_sparse.training.recipe import METHODS, Recipe

# What PEFT trains and saves by itself for a task, by the ends of names.
_HEADS = {"causal_lm": (), "sequence_classification": ("classifier", "score")}
_FILE = "peft_sparse_new_modules.json"  # in the folder of a base that a recipe pruned


def adapter_config(recipe: Recipe, new: list[str] | None = None) -> Any:
    """The PEFT config of a recipe, with the task type that trains and saves a new head, and other new modules."""
    settings = {"task_type": TASKS[recipe.model.task][1]} | recipe.adapter
    if new:
        settings["modules_to_save"] = [*(settings.get("modules_to_save") or []), *new]
    return METHODS[recipe.method](**settings)


def adapt(recipe: Recipe, model: Any, new: list[str]) -> Any:
    """Put a new adapter on a model.

    Args:
        new: from [`new_modules`].

    Raises:
        ValueError: if there is one on it already, as transformers puts one there that is loaded from the Hub, or the
            config does not suit the model.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"A recipe tunes a model, got one with an adapter in `model.path` {recipe.model.path!r}; merge that "
            "first, and name the merged model."
        )
    return get_peft_model(model, adapter_config(recipe, new))


def new_modules(recipe: Recipe, model: nn.Module, missing: list[str]) -> list[str]:
    """The modules beside the head that hold random weights.

    Args:
        missing: names of the weights that were not in the model's files.

    Raises:
        ValueError: if weights of the transformer blocks are among them, which no adapter makes up for, or ones of no
            module that could be saved with it.
    """
    saved = (*_HEADS[recipe.model.task], *(recipe.adapter.get("modules_to_save") or []))
    parameters, linears, found = dict(model.named_parameters()), block_linears(model), []
    for name in missing:
        module, _, _ = name.rpartition(".")
        parts = module.split(".")
        if name not in parameters or any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1)):
            continue
        if not module or any(f"{linear}.".startswith(f"{module}.") for linear in linears):
            raise ValueError(
                f"A recipe tunes a model whose blocks are trained, got none for `{name}` ({len(missing)} in all) in "
                f"{recipe.model.path!r}; name a model of this class, or the task that it was trained for."
            )
        if module not in found:
            found.append(module)
    return found


def note_new_modules(folder: Path, new: list[str]) -> None:
    """Write into the folder of a pruned base, before its weights, which of its modules are random, since among its
    weights those look like any others. The note also tells that a recipe has made the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(new), encoding="utf-8")


def noted_new_modules(folder: Path) -> list[str] | None:
    """What [`note_new_modules`] wrote; None where it has not."""
    path = folder / _FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
