"""What both parts of the demo share: an unchanged transformers Trainer, a quiet terminal and one bar per run."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging


def device() -> torch.device:
    """Where the demo computes: CUDA if there is one, else the CPU, as the Trainer is told below."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    dataset: Sequence[dict[str, Any]],
    *,
    title: str,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    collator: Callable | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Train with AdamW, 10% warm-up and linear decay; the model is in evaluation mode afterwards.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            warmup_steps=max(1, steps // 10),
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,  # in favour of `_Bar`
            label_names=["labels"],
            dataloader_pin_memory=device().type == "cuda",
            use_cpu=device().type == "cpu",
            seed=seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[*callbacks, _Bar(title)],
        )
        trainer.remove_callback(PrinterCallback)  # a line for each logged loss
        trainer.train()
    model.eval()
    return time.perf_counter() - start


class _Bar(TrainerCallback):
    """A progress bar that says what is being trained, with the mean loss of the last steps."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.losses = [*self.losses[-9:], logs["loss"]]
            self.bar.set_postfix(loss=f"{sum(self.losses) / len(self.losses):.3f}", refresh=False)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers logs below the level of an error, and without its bars of loading and saving.

    Both are about steps that take a second, and the new head that it would warn of is meant.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def known_warnings_hidden() -> Iterator[None]:
    """Without warnings that are about the code of dependencies and that a user of the demo can do nothing about."""
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
