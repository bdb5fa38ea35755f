"""Callbacks for transformers' Trainer."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_sparse.training.checkpoints import manifest_size, set_aside_incomplete, write_manifest
from peft_sparse.tuners.pst import driven_adapters


class SparsityCallback(TrainerCallback):
    """Drives PST's sparsity schedule: one step of it for each optimizer step, whatever the gradient accumulation.

    The schedule spans `PstConfig.total_steps`, or else all steps of the training. A resumed run goes on where it
    stopped. As in the authors' code, the sparsity of step t is set after that step and used by the next forward.

    Args:
        best_at_final_sparsity: forget the best metric seen before the final sparsity was reached, so that
            `load_best_model_at_end` chooses among fully sparse models, as the authors do. With False, the best model
            may be an early one with fewer zeros.

    Raises:
        ValueError: when training starts, if the model has no PST layer.

    Example:
        >>> callback = SparsityCallback()  # Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def __init__(self, best_at_final_sparsity: bool = False) -> None:
        self.best_at_final_sparsity = best_at_final_sparsity

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        _set_sparsity(model, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        was_final = not self.best_at_final_sparsity or _is_at_final_sparsity(model)
        _set_sparsity(model, state)
        if not was_final and _is_at_final_sparsity(model):
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None


def _set_sparsity(model: nn.Module, state: TrainerState) -> None:
    for layer, adapter_name in driven_adapters(model):
        total_steps = layer.total_steps(adapter_name) or state.max_steps
        layer.set_sparsity_step(adapter_name, state.global_step, total_steps)


def _is_at_final_sparsity(model: nn.Module) -> bool:
    progress = [layer.sparsity_progress(adapter_name) for layer, adapter_name in driven_adapters(model)]
    return all(now == end for _, now, end in progress)


class CheckpointCallback(TrainerCallback):
    """Lets a run be killed at any moment, also in the middle of a save, and go on from its last complete checkpoint.

    When a Trainer with it is made, unfinished checkpoints that are newer than the last complete one are renamed to
    `incomplete-checkpoint-<step>`: `train(resume_from_checkpoint=True)` takes the newest folder without looking. After
    each save, when all processes are done, a manifest of the files is written, by which
    [`last_complete_checkpoint`](peft_sparse.last_complete_checkpoint) knows a complete checkpoint. Before training
    and before each save it is checked that there is a place for it.

    One run at a time may write to an `output_dir`.

    Raises:
        OSError: when training starts, if nothing can be written to `output_dir`; before a save, if the disk has not
            enough space for it. Older checkpoints stay as they are.

    Example:
        >>> callback = CheckpointCallback()  # trainer = Trainer(model, args, callbacks=[callback], ...)
        >>> # trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    """

    def __init__(self) -> None:
        self._expected_size = 0  # bytes of a checkpoint

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            set_aside_incomplete(args.output_dir)
        PartialState().wait_for_everyone()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if not args.should_save or args.save_strategy == "no":
            return
        if not self._expected_size:  # until the first save tells: at least what is trained
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            self._expected_size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.output_dir):
                pass
        except OSError as error:
            raise OSError(
                error.errno,
                f"Checkpoints are written to `output_dir`, got {args.output_dir!r}, where nothing can be written "
                f"({error.strerror}); choose another folder, or `save_strategy='no'`",
            ) from error

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.should_save or not control.should_save:
            return
        free = shutil.disk_usage(args.output_dir).free
        if free < self._expected_size:
            raise OSError(
                errno.ENOSPC,
                f"A checkpoint takes about {self._expected_size:,} bytes, got {free:,} free in {args.output_dir!r} at "
                f"step {state.global_step}; make room (`save_total_limit` removes old checkpoints) and resume. Older "
                "checkpoints are as they were",
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # the first process writes its last file before others have written theirs
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():  # not so where hyperparameters are searched
            write_manifest(folder)
            self._expected_size = manifest_size(folder)
