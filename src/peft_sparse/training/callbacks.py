"""Callbacks for transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
