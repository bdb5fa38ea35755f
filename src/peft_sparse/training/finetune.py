"""One experiment from its recipe: load, prune if asked, adapt, train, evaluate, merge, verify, save.

Everything is transformers' own Trainer; what is added are the schedule's driver, the numbers it logs, and the checks
after merging. Results go below `training.output_dir`:

    checkpoint-N/     the Trainer's; `resume` goes on from the last complete one
    pruned/           the model that was tuned, where the recipe prunes, with its card
    adapter/          the adapter at the end
    merged/           the merged model, where the recipe asks for it
    result.json       what this function returns; a run that has one is finished
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from peft_sparse.checkpoint.complete import left_out_of
from peft_sparse.checkpoint.generation import generation_config_as_it_is
from peft_sparse.checkpoint.lookup import PRUNED
from peft_sparse.checkpoint.merged import save_with_card
from peft_sparse.checkpoint.models import pad_as
from peft_sparse.checkpoint.new_folder import new_folder, save_model
from peft_sparse.evaluation import sparsity_report, verify_sparsity
from peft_sparse.evaluation.metrics import load_metric
from peft_sparse.evaluation.weights import kept_weights
from peft_sparse.pruning import PRUNERS, calibration_batches
from peft_sparse.pruning.checks import check_positions
from peft_sparse.pruning.plan import plan_pruning, pruning_pattern
from peft_sparse.training.adapt import adapt, new_modules, note_new_modules, noted_new_modules
from peft_sparse.training.build import (
    load_tokenizer,
    make_optimizer,
    make_trainer,
    model_of,
    own_labels,
    training_arguments,
)
from peft_sparse.training.data import Examples, calibration_texts, make_examples
from peft_sparse.training.engines import check_merge_in_one_process, check_trained, loaded_whole, save_adapter
from peft_sparse.training.fit import check_fit, check_hub
from peft_sparse.training.metrics import other_outputs, without_times
from peft_sparse.training.recipe import Recipe
from peft_sparse.training.result import ADAPTER, FinetuneResult
from peft_sparse.training.start import Start, claimed, where_to_start
from peft_sparse.training.teacher import check_teacher, load_teacher


def finetune(recipe: Recipe, resume: bool | str = False) -> FinetuneResult:
    """Run a recipe.

    Args:
        recipe: from [`load_recipe`].
        resume: continue from the last complete checkpoint in `training.output_dir`, or from the one that is named. A
            run that is finished stays as it is, and its result is returned again; one that has all its steps, but was
            stopped before its end, is evaluated, saved and merged.

    Returns:
        What the run did, which is also in result.json.

    Raises:
        ValueError: if data, model or settings do not fit each other, which is found before training; or if there is
            an earlier run in the folder and `resume` is not asked for, or none to resume, or another one is at work
            there; or, when all is written, if the training diverged.

    Examples:
        >>> # result = finetune(load_recipe("configs/spp_causal_lm.yaml", ["training.max_steps=20"]))
        >>> # print(result.metrics, result.merged)
    """
    begin = time.perf_counter()
    arguments = training_arguments(recipe)
    start = where_to_start(recipe, arguments, resume)
    if start.finished is not None:
        _say_finished(recipe)
        return start.finished
    if recipe.output.merge:
        check_merge_in_one_process(arguments)
    check_hub(arguments)
    with claimed(recipe.output_dir, arguments):
        return _run(recipe, arguments, start, begin)


def _run(recipe: Recipe, arguments: TrainingArguments, start: Start, begin: float) -> FinetuneResult:
    """[`finetune`] in a folder of its own, from where it starts; `begin` is when it was called."""
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(recipe.model)
    metrics = {name: load_metric(name) for name in recipe.evaluation.metrics}
    examples = _examples(recipe, tokenizer, arguments)
    teacher = load_teacher(recipe, arguments)
    resumed = start.checkpoint is not None
    model, new = _start_model(recipe, tokenizer, arguments, examples, teacher, resumed)
    set_seed(arguments.seed)  # the same start whether or not something was pruned first
    model = adapt(recipe, model, new)
    if start.trained:
        examples = _without_a_step(arguments, examples, start.steps)
    trainer = make_trainer(recipe, arguments, model, examples, tokenizer, metrics, teacher)
    trained = trainer.train(resume_from_checkpoint=start.checkpoint, ignore_keys_for_eval=other_outputs())
    adapter = str(recipe.output_dir / ADAPTER)
    save_adapter(trainer, adapter)  # the training is done, whatever evaluating and merging say
    measured = {} if start.trained else {"train_loss": trained.metrics["train_loss"]}
    if examples.validation is not None and recipe.evaluation.at_end:
        measured |= without_times(trainer.evaluate(ignore_keys=other_outputs()))
    result = FinetuneResult(
        method=recipe.method,
        steps=trainer.state.global_step,
        resumed_from=start.checkpoint,
        metrics=measured,
        sparsity=sparsity_report(model).total_sparsity,
        trainable=model.get_nb_trainable_parameters()[0],
        adapter=adapter,
        epochs=start.epochs if start.trained else trainer.state.epoch or 0.0,
        log=[entry for entry in trainer.state.log_history if not (start.trained and "train_loss" in entry)],
    )
    if trainer.is_world_process_zero():
        try:
            check_trained(result.adapter)
            if recipe.output.merge:
                _merge(recipe, model, result)
        finally:
            result.seconds = time.perf_counter() - begin
            result.write(recipe.output_dir)
    return result


def plan_finetune(recipe: Recipe, resume: bool | str = False) -> dict[str, Any]:
    """All of [`finetune`] that comes before the first change: data, model, adapter and settings are made and fit each
    other. Nothing is pruned, trained or written.

    Returns:
        What would be run, plain values.
    """
    arguments = training_arguments(recipe)
    start = where_to_start(recipe, arguments, resume)
    if start.finished is not None:
        _say_finished(recipe)
        return {"method": recipe.method, "model": recipe.model.path, "steps left": 0}
    if recipe.output.merge:
        check_merge_in_one_process(arguments)
    check_hub(arguments)
    tokenizer = load_tokenizer(recipe.model)
    examples = _examples(recipe, tokenizer, arguments)
    with warnings.catch_warnings():
        if recipe.pruner is not None:  # which would have been done before
            warnings.filterwarnings("ignore", message="SPP tunes a model that is already pruned")
        model, new = _model(recipe, tokenizer, examples, load_teacher(recipe, arguments))
        if recipe.pruner is not None:
            _plan_prune(recipe, model, tokenizer)
        model = adapt(recipe, model, new)
    make_optimizer(recipe, arguments, model)
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "method": recipe.method,
        "model": recipe.model.path,
        "pruned with": recipe.pruner,
        "trainable": trainable,
        "parameters": total,
        "new modules": ", ".join(new) or None,
        "training examples": "a stream" if recipe.data.streaming else len(examples.train),
        "validation examples": 0 if examples.validation is None else len(examples.validation),
        "resumed from": start.checkpoint,
        "writes to": str(recipe.output_dir),
        "merges to": str(recipe.merged_folder) if recipe.output.merge else None,
    }


def _say_finished(recipe: Recipe) -> None:
    warnings.warn(
        f"The run in {str(recipe.output_dir)!r} is finished; nothing is left to do, and all stays as it is.",
        stacklevel=3,
    )


def _without_a_step(arguments: TrainingArguments, examples: Examples, steps: int) -> Examples:
    """For a Trainer that loads a checkpoint of so many steps, and the best model, and trains no step: an epoch has one
    step, and all are done. Of a run's own epochs the last one may be begun, and it would train a step more."""
    import datasets

    arguments.max_steps, arguments.dataloader_drop_last = steps, False
    return replace(examples, train=datasets.Dataset.from_list([next(iter(examples.train))]))


def _examples(recipe: Recipe, tokenizer: Any, arguments: TrainingArguments) -> Examples:
    return make_examples(recipe.data, recipe.model, tokenizer, arguments.seed, own_labels=own_labels(recipe.model))


def _start_model(
    recipe: Recipe, tokenizer: Any, arguments: TrainingArguments, examples: Examples, teacher: Any, resumed: bool
) -> tuple[Any, list[str]]:
    """The model to adapt, and its new modules."""
    if recipe.pruner is None:
        model, new = _model(recipe, tokenizer, examples, teacher)
    else:
        model, new = _pruned_model(recipe, tokenizer, arguments, examples, teacher, resumed)
    pad_as(model, tokenizer)
    return model, new


def _pruned_model(
    recipe: Recipe, tokenizer: Any, arguments: TrainingArguments, examples: Examples, teacher: Any, resumed: bool
) -> tuple[Any, list[str]]:
    """The pruned model, and its new modules. Of several processes the first one prunes, and the others read what it
    saved."""
    folder = recipe.output_dir / PRUNED
    prunes = not resumed and arguments.process_index == 0
    if prunes:
        with loaded_whole(arguments):
            model, new = _prune(recipe, tokenizer, examples, teacher, folder)
    if not resumed:
        PartialState().wait_for_everyone()
    if prunes and arguments.deepspeed_plugin is None:
        return model, new
    return model_of(recipe, folder), noted_new_modules(folder) or []  # with ZeRO-3 the first one too, for its share


def _model(recipe: Recipe, tokenizer: Any, examples: Examples, teacher: Any) -> tuple[Any, list[str]]:
    """[`model_of`] and its new modules, and it takes the recipe's examples and teacher."""
    missing: list[str] = []
    model = model_of(recipe, on_missing=missing.extend)
    if recipe.model.gguf_file is None and Path(recipe.model.path).is_dir():
        left_out_of(model, recipe.model.path, new_class=True)
    check_positions(model, "data.max_length", recipe.data.max_length)
    check_fit(recipe, model, tokenizer, examples)
    check_teacher(recipe, model, teacher, missing)
    return model, new_modules(recipe, model, missing)


def _prune(recipe: Recipe, tokenizer: Any, examples: Examples, teacher: Any, folder: Path) -> tuple[Any, list[str]]:
    model, new = _model(recipe, tokenizer, examples, teacher)
    PRUNERS[str(recipe.pruner)](model, **_pruning(recipe, tokenizer))
    # The adapter belongs to these weights: they are kept, and its config names them.
    note_new_modules(folder, new)
    with generation_config_as_it_is(model):
        save_with_card(model, folder)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(folder)
    return model, new


def _pruning(recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """The arguments of the pruner."""
    if recipe.pruner == "magnitude":
        return dict(recipe.prune)
    settings = {"num_sequences": 32, "length": recipe.data.max_length} | recipe.calibration
    batches = calibration_batches(calibration_texts(recipe.data), tokenizer, **settings)
    return recipe.prune | {"batches": batches}


def _plan_prune(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """All checks of [`_prune`], which changes nothing."""
    method, arguments = str(recipe.pruner), _pruning(recipe, tokenizer)
    arguments["pattern"] = pruning_pattern(
        method, arguments.get("pattern", "unstructured"), arguments.pop("group", None)
    )
    plan_pruning(model, method, **arguments)


def _merge(recipe: Recipe, model: Any, result: FinetuneResult) -> None:
    """Raises:
    RuntimeError: if what was saved lost a zero of the model that SPP tuned. There is no folder then."""
    folder, before = recipe.merged_folder, None
    if recipe.method == "spp":
        with model.disable_adapter():
            before = kept_weights(model)
    merged = model.merge_and_unload()
    try:
        with new_folder(folder) as temporary:
            save_model(merged, temporary, recipe.output.packed, result.adapter)
            report = None if before is None else verify_sparsity(temporary, reference=before)
            if report is not None and not report.ok:
                raise RuntimeError(
                    f"A merged model keeps the zeros of the one that was tuned, got {report.lost:,} of them lost and "
                    f"{report.violations:,} groups against their pattern; nothing was written to {str(folder)!r}. The "
                    f"adapter is in {result.adapter!r}; please report this with your recipe."
                )
            result.zeros_lost = None if report is None else report.lost
            result.merged, result.sparsity = str(folder), sparsity_report(temporary).total_sparsity
            # Before the folder has its name: a run that is killed in between is merged again, one behind it is
            # finished.
            result.write(recipe.output_dir)
    except Exception:
        result.merged = result.zeros_lost = None  # nothing is there, or what another run has written
        raise
