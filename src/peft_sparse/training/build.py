"""From a recipe to the objects of a run: TrainingArguments, tokenizer, model, Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from peft_sparse.checkpoint import lookup
from peft_sparse.checkpoint.labels import named_labels
from peft_sparse.checkpoint.lookup import is_adapter
from peft_sparse.checkpoint.models import load_model
from peft_sparse.checkpoint.tasks import is_for
from peft_sparse.training.callbacks import DistillationCallback, SparsityCallback, log_before_reporters
from peft_sparse.training.checkpoint_callback import CheckpointCallback
from peft_sparse.training.data import Examples
from peft_sparse.training.labels import Labels
from peft_sparse.training.metrics import Metrics
from peft_sparse.training.param_groups import pst_param_groups
from peft_sparse.training.parts import ModelPart
from peft_sparse.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer


_LESS_IS_BETTER = ("perplexity", "mse")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Raises:
    ValueError: if transformers does not take them."""
    settings = dict(recipe.training)
    if recipe.data.validation_split is not None:
        settings.setdefault("label_names", ["labels"])  # PEFT's wrapper hides the forward's signature
    if str(settings.get("metric_for_best_model")).removeprefix("eval_") in _LESS_IS_BETTER:
        settings.setdefault("greater_is_better", False)  # Trainer knows this of losses only
    settings.setdefault("dataloader_pin_memory", torch.cuda.is_available())  # warns where there is nothing to pin for
    try:
        arguments = TrainingArguments(**settings)
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            reporter()  # which looks for its package
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"`training`: {' '.join(str(error).split())}") from error
    return arguments


def load_tokenizer(model: ModelPart) -> Any:
    """Raises:
    ValueError: if there is none."""
    gguf_file = model.gguf_file if model.tokenizer is None else None
    return lookup.load_tokenizer(
        model.tokenizer or model.path, gguf_file=gguf_file, trust_remote_code=model.trust_remote_code
    )


def own_labels(model: ModelPart) -> dict[str, int]:
    """The numbers of a classifier's labels by name, as its config.json has them; empty for another task, and for a
    model without a classifier's head that names none: what its config has then is a default.

    Raises:
        ValueError: if there is no such model."""
    if model.task != "sequence_classification":
        return {}
    extra = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"A model is a folder or a name on the Hub, got {model.path!r}: {' '.join(str(error).split())}"
        ) from error
    names = names_of(config)
    unnamed = all(name == f"LABEL_{number}" for name, number in names.items())
    return {} if unnamed and not is_for(model.task, config) else names


def names_of(config: Any) -> dict[str, int]:
    """The numbers of a model's labels by name."""
    return {str(name): number for number, name in sorted((config.id2label or {}).items())}


def make_optimizer(recipe: Recipe, arguments: TrainingArguments, model: Any) -> torch.optim.Optimizer | None:
    """That of `training.optim`, with groups of parameters for rates of their own; None where a recipe has no such
    rates, and Trainer makes it.

    Raises:
        ValueError: if there is no such optimizer, or it sorts the parameters by itself."""
    if recipe.score_learning_rate is None and recipe.head_learning_rate is None:
        return None
    lr, score_lr = arguments.learning_rate, recipe.score_learning_rate
    score_lr = lr if score_lr is None else score_lr
    groups = pst_param_groups(model, lr, score_lr, arguments.weight_decay, recipe.head_learning_rate)
    from transformers import Trainer  # loads `datasets` and more: not for who only imports peft_sparse

    try:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"`training.optim`: {' '.join(str(error).split())}") from error
    takes_groups = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if not takes_groups or {"params", "model", "optimizer_dict"} & settings.keys():
        raise ValueError(
            "`training.score_learning_rate` and `head_learning_rate` are of groups of parameters, got the optimizer "
            f"{getattr(arguments.optim, 'value', arguments.optim)}, which makes its own; take another one, such as "
            "adamw_torch, or leave the rates out."
        )
    return optimizer(groups, **settings)


def make_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: Any,
    examples: Examples,
    tokenizer: Any,
    metrics: dict[str, Any],
    teacher: torch.nn.Module | None = None,
) -> Trainer:
    """An unchanged Trainer with the schedule's driver, what it logs, the teacher of a recipe that has one, and
    checkpoints that a killed run can trust."""
    language_model = recipe.model.task == "causal_lm"
    if not language_model:
        # Its loss is a mean over examples. Trainer takes it for a sum over `num_items_in_batch`, since the forward has
        # `**kwargs`, and would multiply it by the processes and by the accumulated batches.
        model.get_base_model().accepts_loss_kwargs = False
    schedule = SparsityCallback(best_at_final_sparsity=recipe.method == "pst")
    callbacks: list[TrainerCallback] = [schedule, CheckpointCallback()]
    if (part := recipe.distillation) is not None:
        callbacks.append(DistillationCallback(teacher, part.weight, part.temperature))
    from transformers import Trainer  # loads `datasets` and more: not for who only imports peft_sparse

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples.train,
        eval_dataset=examples.validation,
        data_collator=examples.collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizers=(make_optimizer(recipe, arguments, model), None),
        **Metrics(metrics, language_model).for_trainer(),
    )
    log_before_reporters(trainer, schedule)
    return trainer


def model_of(
    recipe: Recipe, path: str | Path | None = None, on_missing: Callable[[list[str]], Any] | None = None
) -> Any:
    """The model of a recipe as it is loaded, or the one in another folder in the same way; `on_missing` as in
    [`load_model`]."""
    part = recipe.model
    config = dict(part.config)
    asked = part.num_labels is not None or recipe.data.labels is not None
    adapter = is_adapter(Path(part.path if path is None else path))
    if part.task == "sequence_classification" and (asked or (path is None and not adapter)):
        labels = Labels.of(recipe.data, part, {} if asked else own_labels(part))
        problem = "regression" if labels.count == 1 else "single_label_classification"  # whatever it was before
        config = {"num_labels": labels.count, "problem_type": problem} | config
        if labels.listed and path is None:  # what was trained has its names in its own config
            config = named_labels(list(labels.names)) | config
    if part.new_head and path is None:
        config = config | {"ignore_mismatched_sizes": True}
    return load_model(
        part.path if path is None else path,
        part.task,
        dtype=part.dtype,
        packed=part.packed and path is None,
        gguf_file=part.gguf_file if path is None else None,
        trust_remote_code=part.trust_remote_code,
        config=config,
        on_missing=on_missing,
    )
