"""What a recipe's `training` may say: transformers' TrainingArguments, and two learning rates beside its own."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from peft_sparse.evaluation.metrics import BUNDLED, check_metrics_of_numbers
from peft_sparse.training.values import check_keys, check_type

if TYPE_CHECKING:
    from peft_sparse.training.recipe import Recipe

# Learning rates beside transformers' own, which is that of the weights.
OWN_RATES = {"score_learning_rate": "PST's scores", "head_learning_rate": "a head that is trained beside PST"}
_SEEDS = ("seed", "data_seed")
_COUNTS = ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Settings with which Trainer gives metrics no predictions of the whole split.
_AGAINST_METRICS = {"prediction_loss_only": True, "batch_eval_metrics": True, "eval_do_concat_batches": False}


def check_training(recipe: Recipe) -> None:
    """Raises:
    ValueError: for a key that there is not, a value out of its range, or an evaluation without data or metrics."""
    hints = {item.name: item.type for item in dataclasses.fields(TrainingArguments) if item.init}
    check_keys("training", recipe.training, {*hints, *OWN_RATES})
    folder = recipe.training.get("output_dir")
    if folder is None:
        raise ValueError("`training` needs `output_dir`, the folder for checkpoints and results.")
    if not isinstance(folder, str):
        raise ValueError(
            f"`training.output_dir` is text, the folder for checkpoints and results, got {folder!r}; put ./ before a "
            "name that is a number."
        )
    for name, whose in OWN_RATES.items():
        rate = getattr(recipe, name)
        check_type(f"training.{name}", rate, float | None)
        if rate is not None and recipe.method != "pst":
            raise ValueError(f"`training.{name}` is for {whose}, got it with method {recipe.method!r}; leave it out.")
    _check_numbers(recipe.training)
    _check_effects(recipe.training, recipe.distillation is not None)
    if recipe.data.streaming and recipe.training.get("max_steps", -1) <= 0:
        raise ValueError("A stream has no length, so that `training.max_steps` says when it ends, got none.")
    if recipe.data.streaming and recipe.training.get("dataloader_num_workers", 0) > 1:  # each would read some files
        raise ValueError(
            "A stream is read by one process, got `training.dataloader_num_workers` "
            f"{recipe.training['dataloader_num_workers']}; set it to 1, or leave it out."
        )
    _check_evaluation(recipe)


def without_empty(training: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that have no value. They stay where None is one, where transformers lists what is, and where it
    could be taken for 0."""
    hints = typing.get_type_hints(TrainingArguments) | {"max_grad_norm": None}
    return {name: value for name, value in training.items() if value is not None or _answers_none(hints.get(name))}


def _answers_none(hint: Any) -> bool:
    kinds = typing.get_args(hint) or (hint,)
    return any(kind in (None, type(None)) or isinstance(kind, enum.EnumMeta) for kind in kinds)


def _check_effects(training: Mapping[str, Any], distilled: bool) -> None:
    """What Trainer takes, but does to a run of a recipe what nobody asked for, or nothing."""
    for half in ("bf16", "fp16"):
        if training.get(f"{half}_full_eval"):
            raise ValueError(
                f"An evaluation leaves the weights as they are, got `training.{half}_full_eval: true`, with which "
                f"Trainer makes the model {half} for good, before it is merged and saved; set `training.{half}: true` "
                "for mixed precision, or leave it out."
            )
    if distilled and training.get("label_smoothing_factor"):
        raise ValueError(
            "A teacher is learned from besides the model's own loss, in whose place Trainer puts another with "
            f"`training.label_smoothing_factor`, got {training['label_smoothing_factor']}; leave it out."
        )
    backend, known = training.get("torch_compile_backend"), [one.value.lower() for one in DynamoBackend]
    if backend is not None and str(backend).lower() not in known:
        raise ValueError(
            f"`training.torch_compile_backend` is one of {', '.join(known)}, got {backend!r}; or leave it "
            "out for inductor."
        )
    if training.get("resume_from_checkpoint"):
        raise ValueError(
            "A recipe is the same for a run that starts and one that goes on, got `training.resume_from_checkpoint` "
            f"{training['resume_from_checkpoint']!r}; leave it out, and pass `--resume` (in Python "
            "`finetune(recipe, resume=...)`)."
        )


def _check_numbers(training: Mapping[str, Any]) -> None:
    """What transformers takes as it comes, and then trains with, or fails on in the first step."""
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in training.items():
        kinds = set(typing.get_args(hints[name]) or [hints[name]]) - {type(None)}
        if value is not None and kinds and kinds <= {bool, int, float}:  # a string such as "no" is true in Python
            check_type(f"training.{name}", value, bool if kinds == {bool} else int | float)
    for name in _COUNTS:
        value = training.get(name)
        if value is not None and (value < 1 or value != int(value)) and (name, value) != ("max_steps", -1):
            raise ValueError(f"`training.{name}` is a whole number from 1 up, got {value}; or leave it out.")
    for name in _SEEDS:
        value = training.get(name)
        if value is not None and (not 0 <= value < 2**32 or value != int(value)):
            raise ValueError(f"`training.{name}` is a whole number from 0 up, below 2^32, got {value}.")
    if training.get("max_grad_norm", 1) is None:
        raise ValueError(
            "`training.max_grad_norm` is a number, 0 for gradients as they are, got None; leave it out for 1."
        )
    if not training.get("num_train_epochs", 1) > 0:
        raise ValueError(
            f"`training.num_train_epochs` is above 0, got {training['num_train_epochs']}, with which nothing is "
            "trained; a part of one, such as 0.5, may be meant, or `max_steps`."
        )
    if training.get("learning_rate", 0) < 0:
        raise ValueError(f"`training.learning_rate` is from 0 up, got {training['learning_rate']}.")


def _check_evaluation(recipe: Recipe) -> None:
    training, metrics = recipe.training, recipe.evaluation.metrics
    in_training = training.get("eval_strategy", "no") not in ("no", False, None)
    for name, value in (("load_best_model_at_end", True), ("save_strategy", "best")):
        if training.get(name) == value and not in_training:
            raise ValueError(
                "The best model is chosen by evaluations while it trains, got "
                f"`training.{name}: {str(value).lower()}` without `training.eval_strategy`; set that to "
                '"steps" or "epoch" and name `data.validation_split`, or leave it out.'
            )
    if (in_training or metrics) and recipe.data.validation_split is None:
        raise ValueError(
            "Evaluation takes `data.validation_split`, got none; name it, or leave out `evaluation.metrics` and "
            "`training.eval_strategy`."
        )
    if recipe.model.num_labels == 1:
        check_metrics_of_numbers(metrics)
    language_model = recipe.model.task == "causal_lm"
    for name, value in _AGAINST_METRICS.items():
        if training.get(name) is value and (metrics or language_model):
            raise ValueError(
                f"Metrics, and a language model's perplexity, are made of the predictions of a whole split, got "
                f"`training.{name}: {str(value).lower()}`, which keeps them back; leave it out."
            )
    best, known = training.get("metric_for_best_model"), {"loss", *metrics}
    if language_model:
        known.add("perplexity")
    if best is not None and known <= {"loss", "perplexity", *BUNDLED} and str(best).removeprefix("eval_") not in known:
        raise ValueError(
            f"`training.metric_for_best_model` is one that the run has, {', '.join(sorted(known))}, got {best!r}; "
            "name one of them, or add it to `evaluation.metrics`."
        )
