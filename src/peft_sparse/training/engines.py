"""What FSDP and DeepSpeed's ZeRO-3 want of a run that loads a model in one process, or saves an adapter at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

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


def save_adapter(trainer: Trainer, folder: str) -> None:
    """The adapter and the tokenizer, gathered from all processes, which call this at once."""
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")  # with shards for checkpoints `save_model` saves nothing
    trainer.save_model(folder)
