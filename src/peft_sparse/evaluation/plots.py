"""Pictures of sparsity: where a model keeps its weights, and how a mask changed while it was trained.

A pruner that compares all weights of a layer leaves some rows and columns nearly empty and others nearly full, and
that is what PST's R and C learn directly (arXiv 2205.11005). Colours are for the colour-blind too. matplotlib is an
optional dependency and imported when a picture is made; no global state of it is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_sparse.evaluation.weights import linear_weights

POINTS = 100  # along the sorted rows or columns of a layer
MAX_LABELS = 42


def kept_profile(weight: torch.Tensor, points: int = POINTS) -> tuple[torch.Tensor, torch.Tensor]:
    """How full the rows and the columns of a weight are, sorted from the fullest to the emptiest.

    Args:
        weight: (out, in).
        points: at which the sorted shares are read, evenly from the first to the last.

    Returns:
        (points,) shares of kept weights of rows, and of columns.

    Example:
        >>> rows, columns = kept_profile(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), points=3)
        >>> rows.tolist(), columns.tolist()
        ([0.5, 0.5, 0.0], [0.6666666865348816, 0.0, 0.0])
    """
    kept = (weight != 0).float()
    profiles = []
    for shares in (kept.mean(1), kept.mean(0)):
        places = torch.linspace(0, len(shares) - 1, points).round().long().clamp(max=len(shares) - 1)
        profiles.append(shares.sort(descending=True).values[places.to(shares.device)].cpu())
    return profiles[0], profiles[1]


def plot_sparsity(model_or_path: nn.Module | str | Path, title: str | None = None) -> Any:
    """A row for each linear: how full its rows and its columns are, and its sparsity.

    Pruning without structure would give every row and column of a layer the same share, a strip of one colour. A strip
    that goes from full to empty tells that zeros cluster by row or column.

    Args:
        model_or_path: as in [`sparsity_report`]; with unmerged adapters the weights that the forward uses.
        title: of the picture; None: the total sparsity.

    Returns:
        A matplotlib Figure; `figure.savefig("sparsity.png")` writes it.

    Raises:
        ValueError: as [`sparsity_report`] does.
        ImportError: if matplotlib is not installed.
    """
    figure_cls = _figure_cls()
    weights = linear_weights(model_or_path)
    rows, columns, sparsity, zeros, numel = [], [], [], 0, 0
    for name in weights.names:
        weight = weights.read(name).detach()
        by_row, by_column = kept_profile(weight)
        rows.append(by_row)
        columns.append(by_column)
        sparsity.append(float((weight == 0).double().mean()))
        zeros, numel = zeros + int((weight == 0).sum()), numel + weight.numel()
    count = len(rows)
    figure = figure_cls(figsize=(9, min(max(2.6, 1.4 + 0.2 * count), 14)), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 1.2])
    image = None
    for axis, profiles, what in ((axes[0], rows, "rows (outputs)"), (axes[1], columns, "columns (inputs)")):
        image = axis.imshow(
            torch.stack(profiles).numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest",
            extent=(0, 100, count - 0.5, -0.5),
        )  # fmt: skip
        axis.set_title(f"{what}, fullest to emptiest", fontsize=9)
        axis.set_xlabel("% of them", fontsize=8)
    step = -(-count // MAX_LABELS)
    axes[0].set_yticks(range(0, count, step), [_short(name) for name in weights.names[::step]])
    axes[2].barh(range(count), sparsity, color="#555555", height=0.7)
    axes[2].set(xlim=(0, 1))
    axes[2].set_title("share of zeros", fontsize=9)
    for axis in axes:
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01).set_label("share of weights kept", fontsize=8)
    figure.suptitle(title or f"{zeros / max(numel, 1):.1%} of {numel:,} weights are zero", fontsize=10)
    return figure


def plot_schedule(log: Sequence[Mapping[str, Any]], title: str | None = None) -> Any:
    """Sparsity and mask churn over the steps of a run.

    Args:
        log: `trainer.state.log_history` of a run with `SparsityCallback`; or `log` of a `FinetuneResult` or of
            result.json.
        title: of the picture.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: if no entry has a `sparsity`.
        ImportError: if matplotlib is not installed.
    """
    entries = [entry for entry in log if "sparsity" in entry and "step" in entry]
    if not entries:
        raise ValueError(
            f"A schedule is drawn from a training log with `sparsity`, got {len(log)} entries without it; train with "
            "`SparsityCallback()` and pass `trainer.state.log_history`."
        )
    figure = _figure_cls()(figsize=(7, 3.4), dpi=120, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    steps = [entry["step"] for entry in entries]
    left.plot(steps, [100 * entry["sparsity"] for entry in entries], color="#0072b2", linewidth=2)
    right.bar(
        steps, [100 * entry.get("mask_churn", 0.0) for entry in entries], color="#e69f00", alpha=0.6,
        width=0.8 * min((b - a for a, b in pairwise(steps)), default=1),
    )  # fmt: skip
    left.set_zorder(right.get_zorder() + 1)  # the line in front of the bars
    left.patch.set_visible(False)
    left.set(xlabel="optimizer step", ylim=(0, 100))
    left.set_ylabel("sparsity, %", color="#0072b2")
    right.set_ylabel("mask churn since the last log, %", color="#9c6b00")
    right.set_ylim(bottom=0)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _short(name: str) -> str:
    """The last parts of a name: the number of the block and what follows it."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :]) if numbers else name


def _figure_cls() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures are drawn by the package `matplotlib`; `pip install matplotlib`.") from error
    return Figure
