"""Pictures of sparsity: where a model keeps its weights, and how a mask changed while it was trained.

A pruner that compares all weights of a layer leaves some rows and columns nearly empty and others nearly full, and
that is what PST's R and C learn directly (arXiv 2205.11005). Colours are for the colour-blind too. matplotlib is an
optional dependency and imported when a picture is made; no global state of it is touched.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_sparse.evaluation.weights import linear_weights

POINTS = 100  # along the sorted rows or columns of a layer
MAX_LABELS = 42
MAX_INCHES = 7  # of height
STRIPS_INCHES = 6.8  # of width, beside the names of layers
TITLE_INCHES = 0.17  # of a line's height
TITLE_LETTERS = 11  # for each inch, of average width
MIN_SPREAD = 0.1  # around the mean, so that rounding does not look like structure


def kept_profile(weight: torch.Tensor, points: int = POINTS) -> tuple[torch.Tensor, torch.Tensor]:
    """How full the rows and the columns of a weight are, sorted from the fullest to the emptiest.

    Args:
        weight: (out, in).
        points: at which the sorted shares are read, evenly from the first to the last.

    Returns:
        (points,) shares of kept weights of rows, and of columns; NaN of a weight without any.

    Examples:
        >>> rows, columns = kept_profile(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), points=3)
        >>> rows.tolist(), columns.tolist()
        ([0.5, 0.5, 0.0], [0.6666666865348816, 0.0, 0.0])
    """
    if not weight.numel():
        return torch.full((points,), torch.nan), torch.full((points,), torch.nan)
    kept = (weight != 0).float()
    profiles = []
    for shares in (kept.mean(1), kept.mean(0)):
        last, steps = len(shares) - 1, max(points - 1, 1)
        numbers = torch.arange(points, device=shares.device)
        places = (2 * last * numbers + steps) // (2 * steps)  # whole numbers round alike on every machine
        profiles.append(shares.sort(descending=True).values[places].cpu())
    return profiles[0], profiles[1]


def plot_sparsity(model_or_path: nn.Module | str | Path, title: str | None = None) -> Any:
    """A strip for each linear layer: how full its rows and its columns are, and its sparsity.

    Colours are relative to the layer's mean, so that 50% and 95% are read alike: a row of colour 2 keeps twice the
    share of weights that its layer keeps. Pruning without structure gives a pale strip; one that goes from one colour
    to the other shows that zeros cluster by row or column. N:M and pruners that compare within rows leave rows pale.
    The scale leaves out 2% of the data at either end, and a layer that keeps or has nothing is grey. Strips of a kind
    of linear layer lie together, the first block on top.

    Args:
        model_or_path: as in [`sparsity_report`]; with unmerged adapters the weights that the forward uses.
        title: of the picture; None: the total sparsity.

    Returns:
        A matplotlib Figure, at most 7 inches high however deep the model (and a line's height for each further line of
        the title), and as wide as the names of layers need; `figure.savefig("sparsity.png")` writes it.

    Raises:
        ValueError: as [`sparsity_report`] does.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> # plot_sparsity(pruned_model).savefig("sparsity.png")
    """
    figure_cls = _figure_cls()
    weights = linear_weights(model_or_path)
    kinds = _by_kind(weights.names)
    rows: list[torch.Tensor] = []
    columns: list[torch.Tensor] = []
    sparsity, zeros, numel = [], 0, 0
    for name in chain.from_iterable(kinds.values()):
        weight = weights.read(name).detach()
        kept = int((weight != 0).sum())
        for profiles, profile in zip((rows, columns), kept_profile(weight), strict=True):
            profiles.append(profile * (weight.numel() / kept if kept else float("nan")))
        sparsity.append(1 - kept / weight.numel() if weight.numel() else 0.0)
        zeros, numel = zeros + weight.numel() - kept, numel + weight.numel()
    inches = min(1.6 + max(0.2 * len(kinds), 0.1 * len(rows)), MAX_INCHES)
    figure = figure_cls(figsize=(STRIPS_INCHES, inches), dpi=100, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 1.2])
    _draw_strips(figure, axes, torch.stack(rows), torch.stack(columns))
    axes[2].barh(range(len(sparsity)), sparsity, color="#555555", height=1)
    axes[2].set(xlim=(0, 1))
    axes[2].set_title("share of zeros", fontsize=9)
    _label_kinds(axes, kinds)
    names = max(label.get_window_extent().width for label in axes[0].get_yticklabels())
    figure.set_figwidth(STRIPS_INCHES + names / figure.dpi)  # so that long names leave the strips as they are
    _set_title(figure, title or f"{zeros / max(numel, 1):.1%} of {numel:,} weights are zero")
    return figure


def _draw_strips(figure: Any, axes: Any, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Two images (layers, POINTS) of the share kept relative to the layer's mean, with one colour scale."""
    from matplotlib.colors import TwoSlopeNorm

    ratios = torch.cat([rows, columns]).double()
    ratios = ratios[~ratios.isnan()]
    low, high = ratios.quantile(ratios.new_tensor([0.02, 0.98])).tolist() if len(ratios) else (1.0, 1.0)
    norm = TwoSlopeNorm(1, min(low, 1 - MIN_SPREAD), max(high, 1 + MIN_SPREAD))
    image = None
    for axis, profiles, what in ((axes[0], rows, "rows (outputs)"), (axes[1], columns, "columns (inputs)")):
        axis.set_facecolor("#999999")  # where there is no ratio
        image = axis.imshow(
            profiles.numpy(), aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest",
            extent=(0, 100, len(profiles) - 0.5, -0.5),
        )  # fmt: skip
        axis.set_title(what, fontsize=9)
        axis.set_xlabel("% of them, fullest to emptiest", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01, extend="both")
    bar.set_label("share kept / the layer's mean", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _label_kinds(axes: Any, kinds: Mapping[str, Sequence[str]]) -> None:
    """The name of a kind at the middle of its strips, and a line between one kind and the next."""
    ends = list(accumulate(len(names) for names in kinds.values()))
    step = -(-len(kinds) // MAX_LABELS)
    middles = [(end - len(names) / 2) - 0.5 for end, names in zip(ends, kinds.values(), strict=True)]
    axes[0].set_yticks(middles[::step], list(kinds)[::step])
    for axis in axes:
        axis.tick_params(labelsize=7)
        for end in ends[:-1]:
            axis.axhline(end - 0.5, color="black", linewidth=0.6)


def plot_schedule(log: Sequence[Mapping[str, Any]] | str | Path, title: str | None = None) -> Any:
    """Sparsity and mask churn over the steps of a run.

    Args:
        log: `trainer.state.log_history` of a run with `SparsityCallback`, or `log` of a `FinetuneResult`; or the path
            of a run's result.json, or of the trainer_state.json in a checkpoint.
        title: of the picture.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: if no entry has a `sparsity`, or the file is none of these.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> # plot_schedule(trainer.state.log_history).savefig("schedule.png")
    """
    if isinstance(log, (str, Path)):
        log = _stored_log(Path(log))
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
    alone = "o" if len(steps) == 1 else None  # a line needs two points
    left.plot(steps, [100 * entry["sparsity"] for entry in entries], color="#0072b2", linewidth=2, marker=alone)
    # From one log to the next, in one piece: gaps and seams of thousands of bars would be stripes.
    churn = [100 * entry.get("mask_churn", 0.0) for entry in entries]
    start = max(steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), 0)
    right.stairs(churn, [start, *steps], fill=True, color="#e69f00", alpha=0.6)
    left.set_zorder(right.get_zorder() + 1)  # the line in front of the bars
    left.patch.set_visible(False)
    left.set(xlabel="optimizer step", ylim=(0, 100))
    left.set_ylabel("sparsity, %", color="#0072b2")
    right.set_ylabel("mask churn since the last log, %", color="#9c6b00")
    right.set_ylim(bottom=0)
    if title:
        _set_title(figure, title)
    return figure


def _set_title(figure: Any, title: str) -> None:
    """Above all panels, in as many lines as it needs, for which the figure grows."""
    letters = int(TITLE_LETTERS * figure.get_figwidth())
    lines = list(chain.from_iterable(textwrap.wrap(line, letters) for line in title.splitlines()))
    figure.set_figheight(figure.get_figheight() + TITLE_INCHES * max(len(lines) - 1, 0))
    figure.suptitle("\n".join(lines), fontsize=10)


def _stored_log(path: Path) -> list[Mapping[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"A training log is read from a JSON file, got {str(path)!r} ({error}).") from error
    log = (found.get("log") or found.get("log_history")) if isinstance(found, dict) else None
    if not isinstance(log, list):
        raise ValueError(
            f"A training log is in a result.json as `log` or in a trainer_state.json as `log_history`, got neither in "
            f"{str(path)!r}; name one of these files."
        )
    return log


def _by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of linears by what differs in numbers alone, without what all of them start with."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name), []).append(name)
    tails = [kind.partition("*.")[2] or kind for kind in kinds]
    return dict(zip(tails, kinds.values(), strict=True)) if len(set(tails)) == len(tails) else kinds


def picture_formats() -> list[str]:
    """The endings, without dots, of the files that a picture can be written to.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return sorted(_figure_cls()().canvas.get_supported_filetypes())


def _figure_cls() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures are drawn by the package `matplotlib`; `pip install matplotlib`.") from error
    return Figure
