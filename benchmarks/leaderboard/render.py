"""Tables, CSVs and charts from the store.

For each part and model: `<part>-<model>-<budget>.md` (the table and what it says), `.csv` (the same with every
column), `-runs.csv` (every single run, searches too), `.png` (quality over trained parameters and memory).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.leaderboard import runs
from benchmarks.leaderboard.plan import Line
from benchmarks.leaderboard.settings import Budget
from benchmarks.leaderboard.store import Record
from benchmarks.leaderboard.summary import LARGEST, WHERE_FROM, Row, is_dense, rows_of, task_of, verdicts

PANEL = 4.2  # inches
COSTS = {"trainable": "trained parameters", "peak_mb": "peak of tensors beyond the model, MB"}


def render(
    part: Any, lines: Sequence[Line], records: Mapping[str, Record], out: Path, name: str | None = None
) -> Path | None:
    """Write a part's files.

    Args:
        part: its `name`, `model`, `metric`, `better`, `titles`, `ours`, `rivals`, `budget`.
        lines: rows that belong into the table; those without a result are left out.
        name: added to the files' names, for a table of some rows beside that of all.

    Returns:
        The Markdown file; None: there is no result.
    """
    rows = rows_of(lines, records, part.titles, part.metric)
    if not rows:
        return None
    base = out / "-".join([part.name, part.model, part.budget.name, *([name] if name else [])])
    out.mkdir(parents=True, exist_ok=True)
    report.write([_flat(row) for row in rows], base.with_name(base.name + ".csv"))
    runs.write(lines, records, base.with_name(base.name + "-runs.csv"))
    chart = draw(rows, part, base.with_name(base.name + ".png")) if find_spec("matplotlib") else None
    path = base.with_name(base.name + ".md")
    path.write_text(markdown(part, rows, chart), encoding="utf-8")
    return path


def _flat(row: Row) -> dict[str, Any]:
    names = ("case", "row", "title", "status", "seeds", "at_edge")
    found = {name: getattr(row, name) for name in names} | {"mean": row.mean, "spread": row.spread}
    found["rates"] = " ".join(f"{rate:g}" for rate in row.rates)
    return found | row.columns


# The table


def markdown(part: Any, rows: Sequence[Row], chart: Path | None) -> str:
    """A table for each case, and the verdicts."""
    lines = [f"# {part.name}: {part.model}", "", _budget_text(part.budget), ""]
    cases = list(dict.fromkeys(row.case for row in rows))
    for case in cases:
        lines += [f"## {case}", "", *_table([row for row in rows if row.case == case], part), ""]
    found = verdicts(rows, part.ours, part.rivals, part.better)
    lost = [text for text in found if "LOSES" in text]
    lines += ["## Ours against the others", ""]
    lines += [f"- {text}" for text in found] or ["No case has our row and another one yet."]
    lines += ["", f"Ours loses beyond the spread in {len(lost)} of {len(found)} comparisons.", ""]
    if chart is not None:
        lines += [f"![{part.metric} over trained parameters and memory]({chart.name})", ""]
    return "\n".join([*lines, *_notes(rows)]) + "\n"


def _budget_text(budget: Budget) -> str:
    test = "the whole test set" if budget.test_rows is None else f"{budget.test_rows} rows of the test set"
    return (
        f"Budget `{budget.name}`: {budget.steps} steps of {budget.batch_size} x {budget.length} tokens, AdamW, "
        f"{budget.warmup:.0%} warm-up and linear decay; {budget.tries} learning rates tried for each row on the "
        f"validation part ({budget.validation_rows} rows), measured on {test}. "
        f"{f'The head learns at {budget.head_rate:g} in every row. ' if budget.head_rate else ''}"
        f"{_start_text(budget)}"
        f"{f'Gradients are clipped at {budget.clip:g}. ' if budget.clip != 1 else ''}"
        "Mean ± standard deviation over seeds."
    )


def _start_text(budget: Budget) -> str:
    steps = budget.tuned_first
    return f"Every row starts from one dense model, tuned for {steps} steps before. " if steps else ""


def _table(rows: Sequence[Row], part: Any) -> list[str]:
    extra = [name for name in ("zeroshot", "BLEU") if any(name in row.columns for row in rows)]
    names = {"zeroshot": "zero-shot accuracy, %", "BLEU": "BLEU"}
    heads = ["row", part.metric, *(names[name] for name in extra), "sparsity", "zeros lost", "merge difference"]
    heads += ["trained", "s / step", "peak MB", "rate", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        get = row.columns.get
        scale = {"zeroshot": 100.0, "BLEU": 1.0}
        cells = [row.title, row.status if row.mean is None else plus_minus(row.mean, row.spread)]
        cells += [plus_minus(get(name), get(f"{name}_spread"), scale[name]) for name in extra]
        cells += [_share(get("sparsity")), count(get("zeros_lost")), _short(get("merge_difference"), "{:.1e}")]
        seconds = get("step_cpu_seconds") or get("step_seconds")
        cells += [count(get("trainable")), _short(seconds, "{:.3f}"), _short(get("peak_mb"), "{:.1f}")]
        cells += [" / ".join(f"{rate:g}" for rate in row.rates) + (" (edge)" if row.at_edge else ""), str(row.seeds)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plus_minus(mean: float | None, spread: float | None, scale: float = 1.0) -> str:
    """Such as "12.34 ± 0.56", both times `scale`; without the spread where there is none."""
    if mean is None:
        return ""
    text = f"{mean * scale:.4g}"
    return text if spread is None else f"{text} ± {spread * scale:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def count(value: int | None) -> str:
    """Such as "1,234"."""
    return "" if value is None else f"{value:,}"


def _short(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _notes(rows: Sequence[Row]) -> list[str]:
    where = {name: sorted({str(row.columns[name]) for row in rows if row.columns.get(name)}) for name in WHERE_FROM}
    text = "; ".join(f"{name} {', '.join(values)}" for name, values in where.items() if values)
    return [
        *_checkpoints(rows),
        f"{', '.join(LARGEST)}: the worst of the seeds. Seconds a step: the median, of the process's own time on a "
        "CPU (which others on the machine lengthen less), by the clock on a GPU, which all workers share. Peak: "
        "tensors in the first steps beyond the model's own. (edge): the best rate was the highest or lowest tried, so "
        "a better one may lie beyond.",
        "",
        f"Measured with {text}." if text else "",
    ]


def _checkpoints(rows: Sequence[Row]) -> list[str]:
    """What is to be known of the cases whose rows do not start from one checkpoint, bit for bit."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.columns.get("fingerprint"):
            found.setdefault(row.case, {}).setdefault(row.columns["fingerprint"], []).append(row.title)
    notes = []
    for case, several in found.items():
        which = "; ".join(f"{fingerprint} {', '.join(titles)}" for fingerprint, titles in several.items())
        if len(several) > 1:
            notes += [
                f"Rows of {case} start from checkpoints that were pruned alike, but on several machines, and "
                f"are not the same bit for bit: {which}.",
                "",
            ]
    return notes


# The chart


def draw(rows: Sequence[Row], part: Any, path: Path) -> Path | None:
    """What a row costs and what it gives: the metric over each of [`COSTS`], a line of panels for each case, with what
    the dense model reaches. None: no row has a cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cases = [case for case in dict.fromkeys(row.case for row in rows) if not is_dense(case)]
    cases = [case for case in cases if any(row.case == case and _is_drawn(row) for row in rows)]
    if not cases:
        return None
    figure = Figure(figsize=(PANEL * len(COSTS), 0.85 * PANEL * len(cases) + 0.8), layout="constrained")
    axes = figure.subplots(len(cases), len(COSTS), squeeze=False)
    names = [name for name in part.titles if any(row.row == name and _is_drawn(row) for row in rows)]
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    for line, case in zip(axes, cases, strict=True):
        shown = [row for row in rows if row.case == case and _is_drawn(row)]
        ceilings = [row for row in rows if row.case in ("dense", f"{task_of(case)} dense") and _is_drawn(row)]
        for axis, cost in zip(line, COSTS, strict=True):
            _draw_panel(axis, shown, ceilings, cost, part, colours)
            axis.set_title(case, fontsize=10)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _is_drawn(row: Row) -> bool:
    return row.mean is not None and bool(row.columns.get("trainable"))


def _draw_panel(
    axis: Any, rows: Sequence[Row], ceilings: Sequence[Row], cost: str, part: Any, colours: Mapping[str, str]
) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    for row in ceilings:
        axis.axhline(row.mean, color=colours[row.row], linestyle="--", linewidth=1, label=row.title)
    for row in rows:
        axis.errorbar(
            row.columns[cost], row.mean, yerr=row.spread, color=colours[row.row], label=row.title, linestyle="none",
            marker="*" if row.row == part.ours else "o", markersize=12 if row.row == part.ours else 6, capsize=3,
        )  # fmt: skip
    costs = [row.columns[cost] for row in rows]
    if max(costs) > 10 * min(costs):  # below that its few labels are on top of each other
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(costs) < 1.05 * min(costs):  # else the axis would show the last digits alone
        axis.set_xlim(0.8 * min(costs), 1.2 * max(costs))
    means = [row.mean for row in (*rows, *ceilings)]
    # Perplexities. Of accuracies and correlations those near zero, which are noise, would fill the chart.
    if part.better == "lower" and min(means) > 0 and max(means) > 2 * min(means):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(COSTS[cost], fontsize=9)
    axis.set_ylabel(f"{part.metric} ({part.better} is better)", fontsize=9)
    axis.grid(alpha=0.3)
