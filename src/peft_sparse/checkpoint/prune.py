"""Prune a stored model: load it, calibrate on a file or data set, save. What `peft-sparse prune` calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peft_sparse.checkpoint.convert import Converted, check_new_folder, new_folder, save_model
from peft_sparse.checkpoint.models import load_model
from peft_sparse.evaluation import sparsity_report
from peft_sparse.pruning import PRUNERS, calibration_batches, load_rows
from peft_sparse.pruning.budgets import resolve_sparsities
from peft_sparse.pruning.checks import context_length
from peft_sparse.pruning.run import plan_run
from peft_sparse.pruning.targets import find_targets
from peft_sparse.sparsity import Pattern, pattern_with_group
from peft_sparse.storage import locate_companions

DEFAULT_LENGTH = 512
# What competes where `group` is None, as in the pruners.
_GROUPS = {"magnitude": "layer", "wanda": "row", "sparsegpt": "layer", "ria": "layer"}


def prune_checkpoint(
    source: str | Path,
    folder: str | Path,
    method: str = "wanda",
    *,
    pattern: str = "unstructured",
    sparsity: float | Mapping[str, float] | None = None,
    group: str | None = None,
    data: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    task: str | None = None,
    dtype: str | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    **arguments: Any,
) -> Converted:
    """Prune a model from one folder into another.

    Args:
        source: a folder, dense or packed, or a name on the Hub.
        folder: where to; new or empty.
        method: a key of `PRUNERS`.
        pattern, sparsity, group: as in [`prune_wanda`].
        data: arguments of [`load_rows`] for the calibration text; not for "magnitude", which needs none.
        calibration: arguments of [`calibration_batches`]; `length` is 512, or the model's context if that is shorter.
        task, dtype, trust_remote_code: see [`load_model`].
        packed: save packed.
        dry_run: load and check everything, prune and write nothing.
        **arguments: further ones of the pruner.

    Raises:
        ValueError: if there is no such model, method or data, or they do not fit each other. Nothing is written then.
    """
    folder = check_new_folder(folder)
    if method not in PRUNERS:
        raise ValueError(f"A method is one of {', '.join(PRUNERS)}, got {method!r}.")
    if (data is None) != (method == "magnitude"):
        rule = "prunes by weights alone and takes no data" if method == "magnitude" else "calibrates on data"
        raise ValueError(f"{method} {rule}, got {data!r}; {'leave it out' if data else 'name a file or a data set'}.")
    parsed: Pattern = pattern_with_group(pattern, group, default=_GROUPS[method])
    parsed.resolve_sparsity(None if isinstance(sparsity, Mapping) else sparsity, 0.5)  # before anything is loaded
    rows = None if data is None else load_rows(**data)
    model = load_model(source, task, dtype=dtype, trust_remote_code=trust_remote_code)
    beside = locate_companions(source)
    if rows is not None:
        settings = {"length": min(DEFAULT_LENGTH, context_length(model) or DEFAULT_LENGTH)} | dict(calibration or {})
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        documents = _whole(rows, settings.get("text_column", "text"))
        arguments["batches"] = calibration_batches(documents, tokenizer, **settings)
    if dry_run:
        return _plan(model, str(source), str(folder), method, parsed, sparsity, arguments)
    PRUNERS[method](model, pattern=pattern, sparsity=sparsity, group=group, **arguments)
    with new_folder(folder) as temporary:
        save_model(model, temporary, packed, beside)
    report = sparsity_report(folder)
    counts = (report.total_sparsity, report.pattern, report.total_zeros, report.total_numel)
    return Converted("pruned", str(source), str(folder), True, *counts)


def _whole(rows: Any, column: str) -> Any:
    """A single document as a string, whose sequences are drawn from all over it; other rows as they are."""
    if hasattr(rows, "__len__") and len(rows) == 1 and isinstance(rows[0].get(column), str):
        return rows[0][column]
    return rows


def _plan(
    model: Any,
    source: str,
    folder: str,
    method: str,
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None,
    arguments: dict[str, Any],
) -> Converted:
    names = {key: arguments.get(key) for key in ("target_modules", "exclude_modules")}
    if method == "magnitude":
        targets = find_targets(model, pattern, **names)
        sparsities = resolve_sparsities(targets, pattern, sparsity)
    else:
        run = plan_run(model, arguments["batches"], method, pattern, sparsity, **names)
        targets, sparsities = run.targets, run.sparsities
    before = sparsity_report(model)
    zeros = 0
    for layer in before.layers:
        if layer.name in targets:
            size = pattern.group_size(layer.shape)
            zeros += layer.numel // size * pattern.num_pruned(sparsities[layer.name], size)
        else:
            zeros += layer.zeros
    share = zeros / before.total_numel
    return Converted("pruned", source, folder, False, share, str(pattern), zeros, before.total_numel)
