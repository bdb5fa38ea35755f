"""The training loop that every row shares: AdamW, gradients clipped, rates that rise and then fall linearly."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import memory
from benchmarks.leaderboard.settings import Budget, Diverged
from benchmarks.leaderboard.tuned import Tuned

Batch = dict[str, torch.Tensor]


@dataclass
class Course:
    """What a training run took.

    Attributes:
        peak_mb: megabytes of tensors in the first steps beyond the model's, see `memory.tensor_peak`; None: not
            measured.
        step_seconds: median over the steps, by the clock.
        step_cpu_seconds: the same of the process's own time, which others on the machine do not lengthen; None on a
            GPU.
        last_loss: mean over the last tenth of the steps.
    """

    peak_mb: float | None
    step_seconds: float
    step_cpu_seconds: float | None
    last_loss: float


class Step:
    """One optimizer step with each call, which raises [`Diverged`] at a loss that is no number.

    Args:
        batches: one for each step; calls beyond their number start again.
    """

    def __init__(self, tuned: Tuned, rates: Sequence[float], batches: Sequence[Batch], budget: Budget) -> None:
        self.tuned, self.batches, self.steps, self.clip = tuned, batches, budget.steps, budget.clip
        tuned.prepare(batches)
        self.optimizer = torch.optim.AdamW(tuned.parameter_groups(rates), weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda done: _rate_at(done, budget))
        self.trained = tuned.trainable
        self.done, self.losses = 0, []
        tuned.after_step(0, self.steps)

    def __call__(self) -> None:
        loss = self.tuned.model(**self.batches[self.done % len(self.batches)]).loss
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise Diverged(f"the loss is {self.losses[-1]} after {self.done} steps")
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.tuned.after_step(self.done, self.steps)


def _rate_at(done: int, budget: Budget) -> float:
    warmup = max(1, round(budget.warmup * budget.steps))
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return max(0.0, (budget.steps - done) / max(1, budget.steps - warmup))


def train(
    tuned: Tuned,
    rates: Sequence[float],
    batches: Sequence[Batch],
    budget: Budget,
    device: torch.device,
    measure_peak: bool = False,
) -> Course:
    """Make `budget.steps` steps; the model is in evaluation mode afterwards.

    Args:
        measure_peak: watch the tensors of the first steps, which makes these slower; they are not timed in either
            case.

    Raises:
        Diverged: if a loss is no number.
    """
    tuned.model.train()
    step = Step(tuned, rates, batches, budget)
    peak = None
    if measure_peak:
        peak = memory.tensor_peak(step, device)
    else:
        for _ in range(memory.PEAK_STEPS):
            step()
    wall, cpu = [], []
    while step.done < budget.steps:
        start, cpu_start = _now(device), time.process_time()
        step()
        wall.append(_now(device) - start)
        cpu.append(time.process_time() - cpu_start)
    tuned.model.eval()
    return Course(
        peak_mb=peak,
        step_seconds=statistics.median(wall),
        step_cpu_seconds=statistics.median(cpu) if device.type == "cpu" else None,
        last_loss=statistics.fmean(step.losses[-max(1, budget.steps // 10) :]),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits in evaluation mode, float32 on the CPU: what merging must not change."""
    model.eval()
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float().cpu()


def draw(rows: int, budget: Budget, seed: int, collate: Callable[[list[int]], Batch]) -> list[Batch]:
    """The batches of a seed, the same for every row of a table.

    Args:
        rows: training examples; drawn without replacement until all were used, then anew.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = budget.steps * budget.batch_size
    order: list[int] = []
    while len(order) < needed:
        order += torch.randperm(rows, generator=generator).tolist()
    return [collate(order[start : start + budget.batch_size]) for start in range(0, needed, budget.batch_size)]
