"""What FSDP and DeepSpeed's ZeRO-3 want of a run that loads a model in one process, or saves an adapter at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peft_sparse.tuners.adapter_files import WEIGHTS

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def loaded_whole(arguments: TrainingArguments) -> Iterator[None]:
    """What is loaded inside is whole, and in this process alone, where ZeRO-3 would spread it over all of them and
    wait for those to load it too."""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def check_merge_in_one_process(arguments: TrainingArguments) -> None:
    """Raises:
    ValueError: if no process will have whole weights to merge."""
    engine = "DeepSpeed" if arguments.deepspeed_plugin is not None else "FSDP"
    if engine == "DeepSpeed" or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ValueError(
            f"A recipe is merged by a process that has whole weights, got `output.merge` with {engine}; leave it out, "
            "and merge the adapter afterwards in one process, as docs/distributed.md shows."
        )


def save_adapter(trainer: Trainer, folder: str) -> None:
    """The adapter and the tokenizer, gathered from all processes, which call this at once."""
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")  # with shards for checkpoints `save_model` saves nothing
    trainer.save_model(folder)


def check_trained(folder: str) -> None:
    """Raises:
    ValueError: if the adapter that was saved there has NaN or infinity, which loading and merging it refuse."""
    with safe_open(Path(folder, WEIGHTS), "pt") as file:
        diverged = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    if diverged:
        raise ValueError(
            f"Training ends with finite numbers, got NaN or infinity in `{diverged[0]}` ({len(diverged)} in all) of "
            f"{folder!r}: it diverged; lower `training.learning_rate`, or warm up for longer."
        )
