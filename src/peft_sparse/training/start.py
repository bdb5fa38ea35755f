"""Before anything is loaded: which checkpoint a run goes on from, and whether the places it writes to are free."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerState, TrainingArguments

from peft_sparse.checkpoint.lookup import PRUNED
from peft_sparse.checkpoint.new_folder import check_new_folder, check_writable
from peft_sparse.training.adapt import noted_new_modules
from peft_sparse.training.checkpoints import STATE, checkpoint_fault, checkpoints, last_complete_checkpoint
from peft_sparse.training.engines import check_trained
from peft_sparse.training.recipe import Recipe
from peft_sparse.training.result import ADAPTER, RESULT, FinetuneResult, read_result

# What holds an optimizer's state in a checkpoint: of Trainer alone or with FSDP, of DeepSpeed.
_OPTIMIZERS = ("optimizer*", "global_step*")
# In the folder of a run that is at work. Trainer pushes no file with such a name to the Hub.
_LOCK = "_run.lock"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None for the beginning.
        steps, epochs: that the checkpoint has.
        trained: no step is left.
        finished: the result of a run of which nothing is left to do.
    """

    checkpoint: str | None = None
    steps: int = 0
    epochs: float = 0.0
    trained: bool = False
    finished: FinetuneResult | None = None


def where_to_start(recipe: Recipe, arguments: TrainingArguments, resume: bool | str) -> Start:
    """Where a run begins, or that it is finished.

    Unfinished checkpoints alone, as a run that was killed in its first save leaves them, are no run that could be
    resumed, and in nobody's way: `CheckpointCallback` sets them aside.

    Raises:
        ValueError: if there is none to resume, or there is something in the way.
    """
    _refuse_adapter(recipe.model.path)
    folder, start = recipe.output_dir, Start()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`training.output_dir` is a folder, got {str(folder)!r}, which is a file.")
    if resume is True and _is_done(folder):
        result = _in_its_place(recipe, read_result(folder))
        if _is_finished(recipe, arguments, result):
            check_trained(result.adapter)
            return Start(steps=result.steps, finished=result)
    if resume:
        start = _from(_checked(resume) if isinstance(resume, str) else _last(folder), arguments)
    else:
        _check_own_folder(folder)
        _check_new_places(recipe)
    check_writable(folder)
    if recipe.output.merge:
        check_new_folder(recipe.merged_folder)
    return start


@contextmanager
def claimed(folder: Path, arguments: TrainingArguments) -> Iterator[None]:
    """For the time of a run, its folder: two runs would write over each other. A claim ends with its process.

    Raises:
        ValueError: if another run has it.
    """
    if arguments.process_index > 0:
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"A run has its folder for itself, got {str(folder)!r}, in which another one is at work; wait for its "
            "end, or choose another `training.output_dir`."
        ) from error
    except OSError as error:  # Timeout is one too
        warnings.warn(
            f"The file system of {str(folder)!r} has no locks ({error.strerror}), so nothing keeps a second run out "
            "of it; give each run a `training.output_dir` of its own.",
            stacklevel=4,
        )
    try:
        yield
    finally:
        with suppress(PermissionError):  # on Windows, where releasing it removes it
            (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _is_finished(recipe: Recipe, arguments: TrainingArguments, result: FinetuneResult) -> bool:
    """Whether what a recipe asks for is there. It may ask for more than when the run ended: steps, or a merge."""
    merged = not recipe.output.merge or (
        result.merged is not None and (recipe.merged_folder / "config.json").is_file()
    )
    return merged and Path(result.adapter).is_dir() and _no_step_left(arguments, result.steps, result.epochs)


def _in_its_place(recipe: Recipe, result: FinetuneResult) -> FinetuneResult:
    """The result of a run that may have been moved, or was started from another working directory."""
    merged = str(recipe.merged_folder) if recipe.output.merge and result.merged is not None else result.merged
    return replace(result, adapter=str(recipe.output_dir / ADAPTER), merged=merged)


def _from(checkpoint: str, arguments: TrainingArguments) -> Start:
    state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
    # By the epochs alone, a fraction of one with accumulated batches could seem done a step before its end.
    of_epochs = arguments.max_steps <= 0 and state.global_step < state.max_steps
    trained = not of_epochs and _no_step_left(arguments, state.global_step, state.epoch or 0)
    if not trained and not any(path for pattern in _OPTIMIZERS for path in Path(checkpoint).glob(pattern)):
        raise ValueError(
            f"A run is resumed with its optimizer's state, got none in {checkpoint!r}, as `training.save_only_model` "
            "saves it; start a new run in another `training.output_dir`."
        )
    return Start(checkpoint, state.global_step, state.epoch or 0.0, trained)


def _no_step_left(arguments: TrainingArguments, steps: int, epochs: float) -> bool:
    if arguments.max_steps > 0:
        return steps >= arguments.max_steps
    return epochs >= arguments.num_train_epochs - 1e-6


def _checked(named: str) -> str:
    fault = checkpoint_fault(named) if Path(named).is_dir() else "it is no folder here"
    if fault is not None:
        raise ValueError(
            f"A run is resumed from a checkpoint that is complete, got {named!r}, and {fault}; name an older one, or "
            "none for the last complete one."
        )
    return named


def _last(folder: Path) -> str:
    found = last_complete_checkpoint(folder)
    if found is None:
        unfinished = [f"{path.name} ({checkpoint_fault(path)})" for path in checkpoints(folder)]
        there = f"only {', '.join(unfinished)}" if unfinished else "none"
        way_out = "choose another `training.output_dir`" if _is_done(folder) else "leave `resume` out to start one"
        raise ValueError(
            f"A run is resumed from a checkpoint that is complete, got {there} in {str(folder)!r}; {way_out}."
        )
    return found


def _check_own_folder(folder: Path) -> None:
    found = last_complete_checkpoint(folder)
    if found is not None or _is_done(folder):
        raise ValueError(
            f"A run starts in a folder of its own, got {str(folder)!r} with an earlier run in it; "
            f"{'' if found is None else 'resume it, or '}choose another `training.output_dir`."
        )
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"A run starts in a folder of its own, got {str(folder)!r}, which holds a model; choose another "
            "`training.output_dir`."
        )


def _check_new_places(recipe: Recipe) -> None:
    """Raises:
    ValueError: if a run would overwrite an adapter, or a pruned model that is not what an unfinished run has left."""
    adapter, pruned = recipe.output_dir / ADAPTER, recipe.output_dir / PRUNED
    taken = [adapter] if adapter.exists() else []
    if recipe.pruner and pruned.exists() and noted_new_modules(pruned) is None:
        taken.append(pruned)
    if taken:
        raise ValueError(
            f"A run makes its folders itself, got {str(taken[0])!r}, which is there already; choose another "
            "`training.output_dir`."
        )
    teacher = None if recipe.distillation is None else recipe.distillation.teacher
    read = [name for name in (recipe.model.path, recipe.model.tokenizer, teacher) if name is not None]
    written = [pruned] if recipe.pruner else []
    written += checkpoints(recipe.output_dir)  # which are replaced, or set aside where they are not complete
    for folder in written:
        inside = next((name for name in read if _lies_in(name, folder)), None)
        if inside is not None:
            raise ValueError(
                f"A run writes into {str(folder)!r}, as its `training.output_dir` says, got {inside!r} to read from; "
                "choose another `training.output_dir`."
            )


def _lies_in(path: str, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_done(folder: Path) -> bool:
    return (folder / RESULT).is_file()


def _refuse_adapter(path: str) -> None:
    if (Path(path) / "adapter_config.json").is_file():
        raise ValueError(
            f"A recipe tunes a model, got an adapter in `model.path` {path!r}; merge it first, with "
            f"`peft-sparse merge {path} MERGED`, and name that folder."
        )
