"""Prune a stored model: load it, calibrate on a file or data set, save. What `peft-sparse prune` calls."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peft_sparse.checkpoint.complete import left_out_of
from peft_sparse.checkpoint.convert import Converted
from peft_sparse.checkpoint.lookup import load_tokenizer
from peft_sparse.checkpoint.models import load_model
from peft_sparse.checkpoint.new_folder import check_new_folder, check_writable, new_folder, save_model
from peft_sparse.evaluation import sparsity_report
from peft_sparse.evaluation.weights import linear_weights
from peft_sparse.linears import find_block_lists
from peft_sparse.pruning import PRUNERS, calibration_batches, load_rows
from peft_sparse.pruning.checks import context_length
from peft_sparse.pruning.plan import plan_pruning, pruning_pattern
from peft_sparse.pruning.resume import check_run_folder
from peft_sparse.pruning.walk import check_blocks_called
from peft_sparse.sparsity import Pattern
from peft_sparse.storage import locate_companions

DEFAULT_LENGTH = 512
# How the names of inputs begin that are images or sound.
_NOT_TEXT = ("pixel_values", "input_features", "input_values")
_NO_TEXT = "prune it by magnitude (`--method magnitude`), or in Python with batches of your own"


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
    tokenizer: str | Path | None = None,
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
        task, dtype, trust_remote_code: see [`load_model`]. All weights of a `task` that is named are in the files.
        tokenizer: of the calibration text, and saved with the model: a folder or a name on the Hub. None: the model's.
        packed: save packed.
        dry_run: load and check everything, prune and write nothing.
        **arguments: further ones of the pruner.

    Raises:
        ValueError: if there is no such model, method or data, or they do not fit each other. Nothing is written then.
    """
    folder = check_new_folder(folder)
    _check_checkpoint_dir(arguments.get("checkpoint_dir"), folder)
    _check_method(method, data)
    parsed = pruning_pattern(method, pattern, group, sparsity)
    column = (calibration or {}).get("text_column", "text")
    rows = None if data is None else load_rows(**{"texts": [column], **data})
    tokenizer_from = source if tokenizer is None else tokenizer
    loaded_tokenizer = None
    if rows is not None or tokenizer is not None:  # before the model, since that may take long
        loaded_tokenizer = load_tokenizer(tokenizer_from, trust_remote_code=trust_remote_code)
    new = None if task is None else partial(_refuse_new, str(source), task)
    model = load_model(source, task, dtype=dtype, trust_remote_code=trust_remote_code, on_missing=new)
    beside, lost, called = locate_companions(tokenizer_from), left_out_of(model, source), None
    if rows is not None:
        settings = {"length": min(DEFAULT_LENGTH, context_length(model) or DEFAULT_LENGTH)} | dict(calibration or {})
        arguments["batches"] = calibration_batches(_whole(rows, column), loaded_tokenizer, **settings)
        called = _check_reads_text(model, arguments["batches"])
    if dry_run:
        planned = _plan(model, str(source), str(folder), method, parsed, sparsity, arguments, called)
        return replace(planned, left_out=lost)
    PRUNERS[method](model, pattern=pattern, sparsity=sparsity, group=group, **arguments)
    with new_folder(folder) as temporary:
        save_model(model, temporary, packed, beside)
    report = sparsity_report(folder)
    errors = [layer.error for layer in report.layers if layer.error is not None]
    moved = (min(errors), max(errors)) if errors else None
    return Converted.of("pruned", source, folder, report, output_errors=moved, left_out=lost)


def _check_method(method: str, data: Mapping[str, Any] | None) -> None:
    """Raises:
    ValueError: for an unknown one, or data for one that takes none, or none for one that does."""
    if method not in PRUNERS:
        raise ValueError(f"A method is one of {', '.join(PRUNERS)}, got {method!r}.")
    if (data is None) != (method == "magnitude"):
        rule = "prunes by weights alone and takes no data" if method == "magnitude" else "calibrates on data"
        raise ValueError(f"{method} {rule}, got {data!r}; {'leave it out' if data else 'name a file or a data set'}.")


def _refuse_new(source: str, task: str, names: list[str]) -> None:
    raise ValueError(
        f"A model is pruned with the weights that it has, got none for {', '.join(names[:3])} ({len(names)} in all) "
        f"for {task} in {source!r}, which would be saved random as if they were trained; leave the task out (a recipe "
        "adds a head and trains it), or name the one that the model was trained for."
    )


def _check_checkpoint_dir(checkpoint_dir: str | Path | None, folder: Path) -> None:
    """Raises:
    ValueError: if blocks cannot be kept there, or would fill the folder of the result, which has to be empty, or lie
        beside somebody's files."""
    if checkpoint_dir is None:
        return
    kept = Path(checkpoint_dir).absolute()
    if folder.absolute() in (kept, *kept.parents):
        raise ValueError(
            f"`checkpoint_dir` keeps finished blocks outside of the result's folder, got {str(checkpoint_dir)!r} for "
            f"the result {str(folder)!r}; name another folder."
        )
    check_run_folder(checkpoint_dir)
    check_writable(kept)


def _check_reads_text(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[str] | None:
    """The names of the blocks that text alone calls; None for a model that takes nothing else, where it is not tried,
    and where one token is not enough to tell.

    Raises:
        ValueError: if it reads no text, or needs something else besides: images, sound, or tokens for its decoder,
            which BART makes itself and T5 does not."""
    takes = inspect.signature(model.forward).parameters
    main, others = model.main_input_name, [name for name in takes if name.startswith(_NOT_TEXT)]
    name = type(model).__name__
    if main != "input_ids" and "input_ids" not in takes:
        raise ValueError(
            f"Calibration text is for models that read text, got {name}, which reads `{main}`; {_NO_TEXT}."
        )
    if not others and not getattr(model.config, "is_encoder_decoder", False):
        return None
    called: list[str] = []
    try:
        with _noting_blocks(model, called), torch.no_grad():
            model(**{key: value[:1, :1] for key, value in batches[0].items()})
    except (RuntimeError, IndexError):  # a head may want more than one token
        return None
    except (ValueError, TypeError, AttributeError) as error:  # some models look at what is missing unasked
        besides = f"which takes `{others[0]}` too" if others else "whose decoder takes tokens of its own"
        way_out = _NO_TEXT if others else "prune it by magnitude, or in Python with batches that have `labels`"
        raise ValueError(f"Calibration text is all that a model reads, got {name}, {besides}; {way_out}.") from error
    return called


@contextlib.contextmanager
def _noting_blocks(model: torch.nn.Module, called: list[str]) -> Iterator[None]:
    """The names of the blocks that are called meanwhile go into `called`."""
    with contextlib.ExitStack() as hooks:
        for block_list in find_block_lists(model):
            for index, block in block_list.blocks.named_children():
                name = f"{block_list.name}.{index}"
                hook = block.register_forward_pre_hook(lambda *_, name=name: called.append(name))
                hooks.callback(hook.remove)
        yield


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
    called: list[str] | None,
) -> Converted:
    sparsities = plan_pruning(model, method, pattern, sparsity, **arguments)
    if called is not None:
        check_blocks_called(called, sparsities, len(arguments["batches"]))
    zeros = numel = 0
    weights = linear_weights(model)
    found = str(pattern) if sparsities.keys() >= set(weights.names) else "mixed"
    for name in weights.names:
        weight = weights.read(name)
        numel += weight.numel()
        zeros += _zeros_after(weight, pattern, sparsities[name]) if name in sparsities else int((weight == 0).sum())
    return Converted("pruned", source, folder, False, zeros / numel, found, zeros, numel)


def _zeros_after(weight: torch.Tensor, pattern: Pattern, sparsity: float) -> int:
    """Zeros that are there already are pruned first, and stay where there are more of them."""
    size = pattern.group_size(weight.shape)
    zeros = (weight == 0).reshape(-1, size).sum(1)
    return int(zeros.clamp(min=pattern.num_pruned(sparsity, size)).sum())
