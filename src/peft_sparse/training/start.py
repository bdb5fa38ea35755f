"""Before anything is loaded: which checkpoint a run goes on from, and whether the places it writes to are free."""

from __future__ import annotations

from pathlib import Path

from peft_sparse.checkpoint.convert import check_new_folder, check_writable
from peft_sparse.training.checkpoints import checkpoint_fault, checkpoints, last_complete_checkpoint
from peft_sparse.training.recipe import Recipe


def where_to_start(recipe: Recipe, resume: bool | str) -> str | None:
    """The checkpoint to go on from; None for the beginning.

    Unfinished checkpoints alone, as a run that was killed in its first save leaves them, are no run that could be
    resumed, and in nobody's way: `CheckpointCallback` sets them aside.

    Raises:
        ValueError: if there is none to resume, or there is something in the way.
    """
    _refuse_adapter(recipe.model.path)
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`training.output_dir` is a folder, got {str(folder)!r}, which is a file.")
    if resume:
        found = _checked(resume) if isinstance(resume, str) else _last(folder)
    else:
        found = None
        _check_own_folder(folder)
    check_writable(folder)
    if recipe.output.merge:
        check_new_folder(recipe.merged_folder)
    return found


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


def _is_done(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def _refuse_adapter(path: str) -> None:
    if (Path(path) / "adapter_config.json").is_file():
        raise ValueError(
            f"A recipe tunes a model, got an adapter in `model.path` {path!r}; merge it first, with "
            f"`peft-sparse merge {path} MERGED`, and name that folder."
        )
