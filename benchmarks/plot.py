"""Draw the ratios of the CSVs, a PNG beside each CSV: bars, or lines where a CSV has rows over sparsity or tokens.

    python -m benchmarks.plot                 # all of benchmarks/results
    python -m benchmarks.plot some/file.csv

Of a few cases, one chart for each ratio and case; of many, one for each ratio with the cases below each other; lines,
one for each size; perplexities, one for each setting. Of each case its latest run, if `--append` wrote several.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
NAME_COLUMNS = ("peer", "variant")
CASE_COLUMNS = ("case", "model", "out", "in", "tokens", "method", "setting", "pattern", "sparsity")
# what lines run over, with the axis's label and the fewest values that make a line
LINE_COLUMNS = {"sparsity": ("zeros in the weight", 5), "tokens": ("tokens in a step", 3)}
MOST_CHART_ROWS = 3  # cases; more share a chart
MOST_ACROSS = 3  # charts of ratios or settings beside each other
MOST_SHOWN = 3.0  # ratio in a chart of lines; what is above does not matter
BAR_HEIGHT, CHART_WIDTH, LEAST_WIDTH = 0.28, 5.0, 8.0  # inches


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, of each case those of its latest run."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    latest = {_case(row): row["date"] for row in rows}
    return [row for row in rows if row["date"] == latest[_case(row)]]


def _case(row: dict[str, str]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in CASE_COLUMNS if row.get(name))


def charts(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, dict[str, float]]]:
    """case -> ratio column -> variant -> ratio; a ratio that a variant has not is left out."""
    if "perplexity" in rows[0]:
        return _perplexities(rows)
    name_column = next(name for name in NAME_COLUMNS if name in rows[0])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for column, value in row.items():
            if "ratio_" in column and value:
                found.setdefault(_case(row), {}).setdefault(column, {})[row[name_column]] = float(value)
    return found


def _perplexities(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, dict[str, float]]]:
    """The same for perplexities: model -> setting -> method -> perplexity, the dense model's beside each."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    dense = {row["model"]: float(row["perplexity"]) for row in rows if row["method"] == "dense"}
    for row in rows:
        if row["method"] == "dense":
            continue
        start = {"dense": dense[row["model"]]} if row["model"] in dense else {}
        bars = found.setdefault(row["model"], {}).setdefault(f"perplexity at {row['setting']}", start)
        bars[row["method"]] = float(row["perplexity"])
    return found


def draw(path: Path) -> Path:
    """Write the PNG of one CSV.

    Raises:
        SystemExit: without matplotlib.
    """
    target = path.with_suffix(".png")
    figure_of(path).savefig(target, dpi=110)
    return target


def figure_of(path: Path) -> Figure:
    """The charts of one CSV; raises what `draw` raises."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a screen
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("Drawing takes matplotlib: pip install matplotlib") from None

    rows = read(path)
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if (over := _line_column(rows)) is not None:
        _draw_lines(figure, rows, over)
    elif len(charts(rows)) > MOST_CHART_ROWS:
        _draw_grouped_bars(figure, rows)
    else:
        _draw_bars(figure, rows)
    first = rows[0]
    figure.suptitle(
        f"{path.stem}: {first['hardware']}, {first['threads']} threads, {first['dtype']}, torch {first['torch']}, "
        f"commit {first['commit']}",
        fontsize=9,
    )
    return figure


def _line_column(rows: Sequence[dict[str, str]]) -> str | None:
    """The column that has enough values to draw lines over it."""
    for column, (_, fewest) in LINE_COLUMNS.items():
        if len({row.get(column) for row in rows}) >= fewest:
            return column
    return None


def _set_size(figure: Figure, width: float, height: float) -> None:
    figure.set_size_inches(max(width, LEAST_WIDTH), height)  # the line above the charts needs room


def _draw_bars(figure: Figure, rows: Sequence[dict[str, str]]) -> None:
    cases = charts(rows)
    columns = list(dict.fromkeys(column for ratios in cases.values() for column in ratios))
    most_bars = max(len(bars) for ratios in cases.values() for bars in ratios.values())
    panels = [(case, column, ratios.get(column)) for case, ratios in cases.items() for column in columns]
    across = min(len(columns), MOST_ACROSS)
    lines = -(-len(panels) // across)
    _set_size(figure, CHART_WIDTH * across, lines * (BAR_HEIGHT * most_bars + 1.0) + 0.8)
    axes = figure.subplots(lines, across, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (case, column, bars) in zip(axes, panels, strict=False):
        if not bars:
            axis.set_axis_off()
            continue
        drawn = axis.barh(list(bars), list(bars.values()), color="#4c72b0")
        axis.bar_label(drawn, fmt="%.2f" if "ratio_" in column else "%.4g", padding=3)
        if "ratio_" in column:
            axis.axvline(1.0, color="black", linewidth=0.8)
        else:
            axis.set_xscale("log")
            axis.minorticks_off()  # their labels overlap
        axis.margins(x=0.15 if "ratio_" in column else 0.3)
        axis.invert_yaxis()  # the first row of the CSV on top
        axis.set_title(f"{column.replace('_', ' ')}\n{case}", fontsize=9)


def _draw_grouped_bars(figure: Figure, rows: Sequence[dict[str, str]]) -> None:
    """A chart for each ratio: the cases below each other, named by what differs between them, variants in colours."""
    differing = [name for name in CASE_COLUMNS if len({row.get(name) for row in rows}) > 1]
    labels = {_case(row): ", ".join(row[name] for name in differing if row[name]) for row in rows}
    cases = charts(rows)
    columns = list(dict.fromkeys(column for ratios in cases.values() for column in ratios))
    variants = list(dict.fromkeys(name for ratios in cases.values() for bars in ratios.values() for name in bars))
    _set_size(figure, 1.5 * CHART_WIDTH * len(columns), len(cases) * (BAR_HEIGHT * len(variants) + 0.2) + 1.2)
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for place, variant in enumerate(variants):
            bars = {
                y: case[column][variant] for y, case in enumerate(cases.values()) if variant in case.get(column, {})
            }
            height = 0.8 / len(variants)
            drawn = axis.barh([y + place * height for y in bars], list(bars.values()), height, label=variant)
            axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.set_yticks([y + 0.4 - 0.4 / len(variants) for y in range(len(cases))], [labels[case] for case in cases])
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(column.replace("_", " "), fontsize=9)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_lines(figure: Figure, rows: Sequence[dict[str, str]], over: str) -> None:
    """The first ratio over a column, a chart for each size and in it a line for each variant."""
    column = next(name for name in rows[0] if name.startswith("ratio_"))
    name_column = next(name for name in NAME_COLUMNS if name in rows[0])
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        size = ", ".join(f"{name} {row[name]}" for name in CASE_COLUMNS if row.get(name) and name != over)
        if row[column]:
            points = lines.setdefault(size, {}).setdefault(row[name_column], [])
            points.append((float(row[over]), float(row[column])))
    across = min(len(lines), MOST_ACROSS)
    down = -(-len(lines) // across)
    _set_size(figure, CHART_WIDTH * across, CHART_WIDTH * down)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(lines) :]:
        axis.set_axis_off()
    shared = len({tuple(variants) for variants in lines.values()}) == 1
    for axis, (size, variants) in zip(axes, lines.items(), strict=False):
        for place, (name, points) in enumerate(variants.items()):
            style = "-" if place < 10 else "--"  # matplotlib has ten colours
            axis.plot(*zip(*sorted(points), strict=True), style, label=name, marker=".", color=f"C{place % 10}")
        if over == "tokens":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
        else:
            axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_ylim(0, MOST_SHOWN)
        axis.set_xlabel(LINE_COLUMNS[over][0])
        axis.set_ylabel(column.replace("_", " "))
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(size, fontsize=9)
        if not shared or size == list(lines)[-1]:
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("csv", nargs="*", type=Path, help="CSV files (default: all in benchmarks/results)")
    paths = options.parse_args(argv).csv or sorted(RESULTS.glob("*.csv"))
    if not paths:
        raise SystemExit(f"There is no CSV in {RESULTS} yet; run a benchmark first, see benchmarks/README.md.")
    for path in paths:
        print(draw(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
