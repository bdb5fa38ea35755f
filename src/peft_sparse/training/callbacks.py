"""Callbacks for transformers' Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_sparse.training.distillation import Distillation, check_distillation, stop_teachers, teaching
from peft_sparse.training.mask_log import MaskLog, has_pst_layers, sparse_layers
from peft_sparse.training.param_groups import named_rates
from peft_sparse.tuners.pst import driven_adapters

if TYPE_CHECKING:
    from transformers import Trainer


class SparsityCallback(TrainerCallback):
    """Drives PST's sparsity schedule: one step of it for each optimizer step, whatever the gradient accumulation.

    The schedule spans `PstConfig.total_steps`, or else all steps of the training. A resumed run continues where it
    stopped. As in the authors' code, the sparsity of step t is set after that step and used by the next forward.

    With each training loss it also logs `sparsity`, `mask_churn` (the share of weights that changed state since the
    last log) and statistics of PST's scores; of SPP, which has no schedule, sparsity and churn. All of them are over
    the adapted weights: `sparsity_report` of a model whose blocks hold others too, such as fused experts, shows a
    smaller share. With the groups of [`pst_param_groups`] each learning rate is logged by its name; Trainer alone logs
    that of the scores, which come first. They reach `state.log_history` and every callback behind this one. Those that
    `report_to` names come before the callbacks of a Trainer; `log_before_reporters` lets them have the numbers too.

    Args:
        best_at_final_sparsity: forget, in each step, the best metric seen before the final sparsity was reached, so
            that `load_best_model_at_end` chooses among fully sparse models, as the authors do, and that
            EarlyStoppingCallback begins to count there. With False, the best model may be an early one with fewer
            zeros.
        log: False logs nothing. Logging costs a pass over the masks and scores each time, and one bit per weight.

    Raises:
        ValueError: when training starts, if the model has no PST or SPP layer.

    Examples:
        >>> callback = SparsityCallback()  # Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def __init__(self, best_at_final_sparsity: bool = False, log: bool = True) -> None:
        self.best_at_final_sparsity = best_at_final_sparsity
        self.log = log
        self._masks: MaskLog | None = None
        self._rates: dict[str, float] = {}  # of the last optimizer step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        stop_teachers(model, state)
        _set_sparsity(model, state)
        self._masks = MaskLog(model) if self.log else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rates = named_rates(kwargs.get("optimizer"))  # a log comes after the scheduler's step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        was_final = not self.best_at_final_sparsity or _is_at_final_sparsity(model)
        _set_sparsity(model, state)
        if not was_final:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs is not None and "loss" in logs and self._masks is not None:
            rates = self._rates if "learning_rate" in logs else {}
            _add_to_log(state, logs, rates | self._masks.measure(model))


class DistillationCallback(TrainerCallback):
    """Lets a Trainer train with a teacher, see [`peft_sparse.distill`].

    The training loss that is logged is the sum; evaluation is without the teacher.

    Args:
        teacher: a dense model with the same tokenizer and labels, best one that is tuned for the task; it is moved to
            the Trainer's device. None: the model that is trained, with its adapters off, which is for PST.
        weight: of the teacher, above 0; 1 leaves the labels out.
        temperature: above 0.

    A training that an error or Ctrl-C ends leaves the teacher on the model; the next one that has this callback or
    [`SparsityCallback`] takes it off.

    Raises:
        TypeError: for a teacher that is no model.
        ValueError: for a weight or temperature out of range; when training starts, for a model that is no teacher of
            its own, a teacher that has modules of the model, or label smoothing; in a step, for tokens or outputs that
            do not fit, or for a Trainer whose loss is not the model's.

    Examples:
        >>> callback = DistillationCallback()  # Trainer(model, args, ..., callbacks=[SparsityCallback(), callback])
    """

    def __init__(self, teacher: nn.Module | None = None, weight: float = 0.5, temperature: float = 1.0) -> None:
        check_distillation(weight, temperature, teacher)
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._open = ExitStack()
        self._distillation: Distillation | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._open.close()
        stop_teachers(model, state)
        if args.label_smoothing_factor:  # Trainer's own loss, made of the logits
            raise ValueError(
                "A teacher's loss is added to the one that the model returns, got label_smoothing_factor="
                f"{args.label_smoothing_factor}, which replaces it; leave it out."
            )
        if self.teacher is not None and not hasattr(self.teacher, "hf_device_map"):
            self.teacher.to(args.device)
        self._distillation = self._open.enter_context(
            teaching(model, self.teacher, self.weight, self.temperature, training=state)
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = self._distillation
        if found is not None and found.gave and not found.taught:
            raise ValueError(
                "A teacher's loss is added to the one that the model returns, got a step of a Trainer that learned "
                "from another one; leave out its `compute_loss_func`, or what else replaces the model's loss."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._open.close()


def log_before_reporters(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Put callbacks first in a Trainer, so that what they add to a log reaches every reporter (TensorBoard, Weights &
    Biases, ...); ones that it has already move there.

    Examples:
        >>> # trainer = Trainer(..., callbacks=[callback := SparsityCallback()])
        >>> # log_before_reporters(trainer, callback)
    """
    handler = trainer.callback_handler
    handler.callbacks = [*callbacks, *(one for one in handler.callbacks if one not in callbacks)]


def _add_to_log(state: TrainerState, logs: dict[str, Any], numbers: dict[str, float]) -> None:
    logs.update(numbers)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(numbers)  # it has a copy of the log from before callbacks saw it


def _set_sparsity(model: nn.Module, state: TrainerState) -> None:
    if not has_pst_layers(model) and sparse_layers(model):
        return  # SPP keeps the zeros that the model came with
    for layer, adapter_name in driven_adapters(model):
        total_steps = layer.total_steps(adapter_name) or state.max_steps
        layer.set_sparsity_step(adapter_name, state.global_step, total_steps)


def _is_at_final_sparsity(model: nn.Module) -> bool:
    if not has_pst_layers(model):
        return True
    progress = [layer.sparsity_progress(adapter_name) for layer, adapter_name in driven_adapters(model)]
    return all(now == end for _, now, end in progress)
