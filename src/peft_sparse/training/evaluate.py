"""Measure a model on a recipe's validation data: perplexity of a text, loss, and metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from peft_sparse.checkpoint.lookup import has_tokenizer
from peft_sparse.checkpoint.models import pad_as
from peft_sparse.checkpoint.tasks import task_of
from peft_sparse.evaluation import perplexity, sparsity_report
from peft_sparse.evaluation.metrics import load_metric
from peft_sparse.pruning.checks import check_positions, context_length
from peft_sparse.training.build import load_tokenizer, model_of, names_of
from peft_sparse.training.data import Examples, make_examples, token_stream
from peft_sparse.training.fit import check_fit
from peft_sparse.training.labels import label_names
from peft_sparse.training.metrics import Metrics, other_outputs, without_times
from peft_sparse.training.recipe import Recipe, make_recipe


def evaluate_recipe(
    recipe: Recipe,
    path: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    tokenizer_from: str | Path | None = None,
) -> dict[str, Any]:
    """The numbers of a model on `data.validation_split`.

    Text of a causal language model is measured as a whole, in windows of `data.max_length` tokens that do not overlap,
    see [`perplexity`]; anything else by Trainer, prompts and completions with the loss and the perplexity of all
    tokens that are learned, whatever the batch size. All weights have to be in the model's files, or in the adapter's.

    Args:
        recipe: its model, data and evaluation parts are used.
        path: a model, packed or dense, or an adapter, in place of the recipe's.
        batch_size: examples at once; None: the recipe's, or 8. Not for text, whose windows are measured one by one.
        progress: show a bar.
        tokenizer_from: a folder or a name on the Hub; None: `path` if it has a tokenizer, else the recipe's.

    Returns:
        Plain values: `model`, `sparsity`, `examples` or `tokens`, and the metrics.

    Raises:
        ValueError: if there is no validation split, a weight would be random, data and model do not fit each other, or
            a batch size is given for text.
    """
    return _evaluate(recipe, path, batch_size, progress, tokenizer_from, shorten=False)


def _evaluate(
    recipe: Recipe,
    path: str | Path | None,
    batch_size: int | None,
    progress: bool,
    tokenizer_from: str | Path | None,
    shorten: bool,
) -> dict[str, Any]:
    """[`evaluate_recipe`]; with `shorten`, in the model's context where that is shorter than `data.max_length`."""
    data, split = recipe.data, recipe.data.validation_split
    if split is None:
        raise ValueError("Evaluation takes `data.validation_split`, got none; name the split to measure on.")
    part = recipe.model
    whole_text = part.task == "causal_lm" and data.text is not None and not recipe.evaluation.metrics
    if whole_text and batch_size is not None:
        raise ValueError(
            f"Text is measured window by window, which needs the least memory, got a batch size of {batch_size}; "
            "leave `batch_size` out, on the command line --batch-size."
        )
    if tokenizer_from is None and path is not None and has_tokenizer(path):
        tokenizer_from = path
    if tokenizer_from is not None:
        part = replace(part, tokenizer=str(tokenizer_from))
    metrics = {name: load_metric(name) for name in recipe.evaluation.metrics}
    tokenizer = load_tokenizer(part)
    found: dict[str, Any] = {"model": str(path or part.path)}
    model = model_of(recipe, path, on_missing=partial(_refuse_random, found["model"])).eval()
    if shorten:
        data = replace(data, max_length=min(data.max_length, context_length(model) or data.max_length))
    check_positions(model, "data.max_length", data.max_length)
    if whole_text:
        limit = None if data.validation_examples is None else data.validation_examples * data.max_length
        ids = torch.tensor(token_stream(data, split, tokenizer)[:limit], dtype=torch.int64)
        found |= {"sparsity": sparsity_report(model).total_sparsity, "tokens": len(ids)}
        return found | {"perplexity": perplexity(model, ids, window=data.max_length, progress=progress)}
    if part.task == "sequence_classification":
        part = replace(part, num_labels=model.config.num_labels)
        _check_label_order(names_of(model.config), data.labels)
    own = names_of(model.config) if part.task == "sequence_classification" else {}
    examples = make_examples(data, part, tokenizer, seed=0, train=False, own_labels=own)
    pad_as(model, tokenizer)
    found |= {"sparsity": sparsity_report(model).total_sparsity, "examples": len(examples.validation)}
    check_fit(recipe, model, tokenizer, examples)
    size = batch_size or recipe.training.get("per_device_eval_batch_size", 8)
    return found | _by_trainer(model, examples, tokenizer, metrics, size, progress, part.task == "causal_lm")


def _by_trainer(
    model: Any,
    examples: Examples,
    tokenizer: Any,
    metrics: dict[str, Any],
    batch_size: int,
    progress: bool,
    language_model: bool,
) -> dict[str, float]:
    """Loss and metrics on the validation part."""
    from transformers import Trainer  # loads `datasets` and more: not for who only imports peft_sparse

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder, "report_to": [], "disable_tqdm": not progress, "label_names": ["labels"],
            "per_device_eval_batch_size": batch_size,
            "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(),
        }  # fmt: skip
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            eval_dataset=examples.validation,
            data_collator=examples.collator,
            processing_class=tokenizer,
            **Metrics(metrics, language_model).for_trainer(),
        )
        measured = trainer.evaluate(ignore_keys=other_outputs())
    return {name.removeprefix("eval_"): value for name, value in without_times(measured).items()}


def _check_label_order(own: Mapping[str, int], labels: Sequence[Any] | None) -> None:
    """Raises:
    ValueError: if the model gives the names that data lists other numbers."""
    names = sorted(own, key=lambda name: own[name])
    listed = names if labels is None else label_names(labels)
    if listed != names and sorted(listed) == sorted(names):
        raise ValueError(
            f"`data.labels` lists a model's labels in the order of their numbers, got {listed}, and the model's "
            f"config.json has {names}; correct the one that is wrong."
        )


def evaluate_model(
    path: str | Path,
    *,
    data: Mapping[str, Any],
    task: str | None = None,
    metrics: Sequence[str] = (),
    batch_size: int | None = None,
    progress: bool = True,
    **model: Any,
) -> dict[str, Any]:
    """[`evaluate_recipe`] without a recipe.

    Args:
        path: of a model or an adapter.
        data: the fields of a recipe's data part; None leaves one as it is. Without `max_length`, up to 512 tokens: as
            many as the model takes.
        task: of its model part; None: see [`task_of`].
        **model: of its model part.
        metrics, batch_size, progress: see [`evaluate_recipe`].

    Raises:
        ValueError: see [`evaluate_recipe`]; or if a classifier is to be measured on rows without a label.
    """
    shorten = data.get("max_length") is None
    data = dict(data) | {"train_split": data.get("validation_split")} | ({"max_length": 512} if shorten else {})
    task = task or task_of(path, bool(model.get("trust_remote_code")))
    if task == "sequence_classification" and not data.get("label"):
        raise ValueError(
            f"A classifier, as {str(path)!r}, is measured on texts with labels, got no column of labels; name it in "
            "`label`, on the command line in --label-column."
        )
    given = {"model": {"path": str(path), "task": task} | model, "data": data}
    parts = {part: {k: v for k, v in values.items() if v is not None} for part, values in given.items()}
    # Nothing is trained: the parts that say how have what they need to be a recipe's.
    unused = {"adapter": {"method": "spp"}, "training": {"output_dir": "unused"}}
    recipe = make_recipe(parts | unused | {"evaluation": {"metrics": list(metrics)}})
    return _evaluate(recipe, path, batch_size, progress, recipe.model.tokenizer, shorten)


def _refuse_random(source: str, names: list[str]) -> None:
    raise ValueError(
        f"Evaluation measures trained weights, got none for {', '.join(names[:3])} ({len(names)} in all) in "
        f"{source!r}, which would be random; name the task that the model was trained for, or train it first."
    )
