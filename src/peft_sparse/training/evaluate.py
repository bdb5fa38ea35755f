"""Measure a model on a recipe's validation data: perplexity of a text, loss, and metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from peft_sparse.evaluation import perplexity, sparsity_report
from peft_sparse.evaluation.metrics import load_metric
from peft_sparse.training.build import Metrics, load_tokenizer, model_of, most_likely
from peft_sparse.training.data import make_examples, token_stream
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
    see [`perplexity`]; anything else by Trainer.

    Args:
        recipe: its model, data and evaluation parts are used.
        path: a model, packed or dense, or an adapter, in place of the recipe's.
        batch_size: examples at once; None: the recipe's, or 8.
        progress: show a bar.
        tokenizer_from: a folder or a name on the Hub; None: `path` if it has a tokenizer, else the recipe's.

    Returns:
        Plain values: `model`, `sparsity`, `examples` or `tokens`, and the metrics.

    Raises:
        ValueError: if there is no validation split, or data and model do not fit each other.
    """
    data = recipe.data
    if data.validation_split is None:
        raise ValueError("Evaluation takes `data.validation_split`, got none; name the split to measure on.")
    part = recipe.model
    if tokenizer_from is None and path is not None and any(Path(path).glob("tokenizer*")):
        tokenizer_from = path
    if tokenizer_from is not None:
        part = replace(part, tokenizer=str(tokenizer_from))
    metrics = {name: load_metric(name) for name in recipe.evaluation.metrics}
    tokenizer = load_tokenizer(part)
    found: dict[str, Any] = {"model": str(path or part.path)}
    whole_text = part.task == "causal_lm" and data.text is not None and not metrics
    if whole_text:
        limit = None if data.validation_examples is None else data.validation_examples * data.max_length
        ids = torch.tensor(token_stream(data, data.validation_split, tokenizer)[:limit], dtype=torch.int64)
        model = model_of(recipe, path).eval()
        found |= {"sparsity": sparsity_report(model).total_sparsity, "tokens": len(ids)}
        return found | {"perplexity": perplexity(model, ids, window=data.max_length, progress=progress)}
    model = model_of(recipe, path).eval()
    if part.task == "sequence_classification":
        part = replace(part, num_labels=model.config.num_labels)
    examples = make_examples(data, part, tokenizer, seed=0, train=False)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    found |= {"sparsity": sparsity_report(model).total_sparsity, "examples": len(examples.validation)}
    language_model = part.task == "causal_lm"
    from transformers import Trainer  # loads `datasets` and more: not for who only imports peft_sparse

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder, "report_to": [], "disable_tqdm": not progress, "label_names": ["labels"],
            "per_device_eval_batch_size": batch_size or recipe.training.get("per_device_eval_batch_size", 8),
            "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(),
        }  # fmt: skip
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            eval_dataset=examples.validation,
            data_collator=examples.collator,
            processing_class=tokenizer,
            compute_metrics=Metrics(metrics, language_model) if metrics else None,
            preprocess_logits_for_metrics=most_likely if language_model and metrics else None,
        )
        measured = trainer.evaluate()
    times = ("_runtime", "_per_second", "preparation_time", "epoch")
    found |= {key.removeprefix("eval_"): value for key, value in measured.items() if not key.endswith(times)}
    if language_model:
        found["perplexity"] = float(torch.tensor(found["loss"], dtype=torch.float64).exp())
    return found


def evaluate_model(
    path: str | Path,
    *,
    data: Mapping[str, Any],
    task: str = "causal_lm",
    metrics: Sequence[str] = (),
    batch_size: int | None = None,
    progress: bool = True,
    **model: Any,
) -> dict[str, Any]:
    """[`evaluate_recipe`] without a recipe.

    Args:
        path: of a model or an adapter.
        data: the fields of a recipe's data part; None leaves one as it is.
        task, **model: of its model part.
        metrics, batch_size, progress: see [`evaluate_recipe`].
    """
    data = dict(data) | {"train_split": data.get("validation_split")}
    given = {"model": {"path": str(path), "task": task} | model, "data": data}
    parts = {part: {k: v for k, v in values.items() if v is not None} for part, values in given.items()}
    # Nothing is trained: the parts that say how have what they need to be a recipe's.
    unused = {"adapter": {"method": "spp"}, "training": {"output_dir": "unused"}}
    recipe = make_recipe(parts | unused | {"evaluation": {"metrics": list(metrics)}})
    return evaluate_recipe(recipe, path, batch_size, progress, tokenizer_from=recipe.model.tokenizer)
