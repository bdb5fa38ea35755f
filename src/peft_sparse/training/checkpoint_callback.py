"""The callback by which a run can be killed at any moment; [`checkpoints`] has what it writes and how that is read."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_sparse.training.checkpoints import (
    MANIFEST,
    checkpoints,
    manifest_size,
    saved_again,
    set_aside_incomplete,
    write_manifest,
)

# Bytes of a checkpoint's small files, such as the trainer's state and the random ones, and of the disk's blocks.
_REST = 1 << 16


class CheckpointCallback(TrainerCallback):
    """Lets a run be killed at any moment, also in the middle of a save, and resume from its last complete checkpoint.

    When a Trainer with it is made, unfinished checkpoints that are newer than the last complete one are renamed to
    `incomplete-checkpoint-<step>`: `train(resume_from_checkpoint=True)` takes the newest folder without looking. After
    each save, when all processes are done, a manifest of the files is written, by which [`last_complete_checkpoint`]
    recognises a complete checkpoint. Before training it checks that the folder can be written, and before each save
    that the disk has room for it.

    One run at a time may write to an `output_dir`.

    Raises:
        OSError: when training starts, if nothing can be written to `output_dir`; before a save, if the disk has not
            enough space for it. Older checkpoints stay as they are.

    Examples:
        >>> callback = CheckpointCallback()  # trainer = Trainer(model, args, callbacks=[callback], ...)
        >>> # trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    """

    def __init__(self) -> None:
        self._last_size = 0  # bytes of the last checkpoint

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            set_aside_incomplete(args.output_dir)
        PartialState().wait_for_everyone()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.should_save or args.save_strategy == "no":
            return
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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        if not args.should_save or not control.should_save:
            return
        size = _REST + (self._last_size or _bytes_to_save(model, optimizer, args.save_only_model))
        free = shutil.disk_usage(args.output_dir).free
        if free < size:
            raise OSError(
                errno.ENOSPC,
                f"A checkpoint takes about {size:,} bytes, got {free:,} free in {args.output_dir!r} at "
                f"step {state.global_step}; make room (`save_total_limit` removes old checkpoints) and resume. Older "
                "checkpoints are as they were",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not getattr(args, "enable_jit_checkpoint", False):
            return
        PartialState().wait_for_everyone()
        for folder in checkpoints(args.output_dir)[:1]:  # a step may have come after it
            if args.should_save and (saved_again(folder) or not (folder / MANIFEST).exists()):
                write_manifest(folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # the first process writes its last file before others have written theirs
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():  # not so where hyperparameters are searched
            write_manifest(folder)
            self._last_size = manifest_size(folder)


def _bytes_to_save(model: nn.Module, optimizer: torch.optim.Optimizer, save_only_model: bool) -> int:
    """What is trained, and what its optimizer keeps of it, in this process."""
    tensors: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not save_only_model:
        tensors += [value for kept in optimizer.state.values() for value in kept.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
