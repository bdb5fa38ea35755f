"""The teacher of a recipe with `distillation`, see distillation.py."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from peft_sparse.pruning.token_inputs import text_config
from peft_sparse.training.build import model_of, names_of
from peft_sparse.training.engines import loaded_whole
from peft_sparse.training.recipe import Recipe


def load_teacher(recipe: Recipe, arguments: TrainingArguments) -> nn.Module | None:
    """The model that `distillation.teacher` names; None where there is none, or the student is its own.

    Raises:
        ValueError: if there is no such model, or it has weights that would be random.
    """
    if recipe.distillation is None or recipe.distillation.teacher is None:
        return None
    with loaded_whole(arguments):
        return model_of(recipe, recipe.distillation.teacher, on_missing=_Refusal(recipe.distillation.teacher))


def check_teacher(recipe: Recipe, student: Any, teacher: Any, missing: list[str]) -> None:
    """Whether teacher and student have the same outputs.

    Args:
        student: before it is adapted.
        teacher: from [`load_teacher`].
        missing: names of the student's weights that were not in its files.

    Raises:
        ValueError: if they have not, or the same names of labels in another order, or the student is to teach itself
            and has a new head.
    """
    if recipe.distillation is None:
        return
    if teacher is None:
        if missing:
            raise ValueError(
                "A model without `distillation.teacher` learns from itself with its adapter off, so it is one that "
                f"was tuned for the task, got {recipe.model.path!r} without `{missing[0]}` ({len(missing)} weights "
                "are new); tune it densely first and name the result in `model.path`, or name a teacher."
            )
        return
    name = "num_labels" if recipe.model.task == "sequence_classification" else "vocab_size"
    own, other = (getattr(text_config(model.config), name) for model in (student, teacher))
    if own != other:
        raise ValueError(
            f"A teacher has the student's outputs, got {name} {other} in `distillation.teacher` "
            f"{recipe.distillation.teacher!r} and {own} in the model; take one with the same tokenizer and labels."
        )
    own, other = (list(names_of(model.config)) for model in (student, teacher))
    if name == "num_labels" and own != other and sorted(own) == sorted(other):
        raise ValueError(
            f"A teacher has the student's labels in the same order, got {other} in `distillation.teacher` "
            f"{recipe.distillation.teacher!r} and {own} in the model; list them in `data.labels` as the teacher does."
        )


class _Refusal:
    """For a teacher whose head is not in its files."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, missing: list[str]) -> None:
        raise ValueError(
            f"A teacher was tuned for the task, got {self.path!r} without `{missing[0]}` ({len(missing)} weights "
            "would be random); name the folder of the tuned model."
        )
