"""All tables of a folder on one page: for each part and model the rows side by side, a column for each case.

It is made from the CSVs beside the tables, so it has what was run elsewhere and at other times too. Tables that were
given a name (`--name`) are looks at one question and stay out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.encoders import TASKS
from benchmarks.leaderboard.parts import CLASSES
from benchmarks.leaderboard.render import count, plus_minus
from benchmarks.leaderboard.settings import Budget
from benchmarks.leaderboard.summary import is_dense, outcome, task_of

PAGE = "overview.md"
OURS = "(ours)"  # how titles of our rows end
INTRODUCTION = """\
# Overview

Made by `python -m benchmarks.leaderboard` from the tables here. The heads of the columns lead to those, which have
the zeros lost, memory and seconds a step too. Mean ± standard deviation over seeds, at the best of a few learning
rates, the same number for each row of a table.

**Bold**: no sparse row of the column that trains as few parameters (up to a tenth more) is better beyond the spread;
one that trains more may be. **†**: not all rows start from the same checkpoint, bit for bit; the table says which do.
"""
TOLERANCE = 1.1  # of the number of trained parameters: a rank is a whole number, so that none is met exactly


@dataclass(frozen=True)
class Cell:
    """A row's result in one case. `spread` is None of fewer than two seeds."""

    mean: float
    spread: float | None
    trained: int
    fingerprint: str


@dataclass(frozen=True)
class Column:
    """A case of one table; `cells` by row, with those of the dense model."""

    head: str
    cells: Mapping[str, Cell]
    dense: frozenset[str]


def write(folder: Path) -> Path | None:
    """Write the page of a folder of tables. None: it has no table."""
    sections: dict[tuple[str, str, str], list[Column]] = {}
    for path in sorted(folder.glob("*-runs.csv")):
        table = path.with_name(path.name.replace("-runs.csv", ".csv"))
        with path.open(newline="", encoding="utf-8") as file:
            run = next(csv.DictReader(file), None)
        if run is None or not table.is_file():
            continue
        budget = Budget(**json.loads(run["budget"]))
        if table.stem == f"{run['part']}-{run['model']}-{budget.name}":
            key = (run["part"], run["model"], _protocol(budget))
            sections.setdefault(key, []).extend(_columns(table, budget))
    if not sections:
        return None
    page = folder / PAGE
    texts = [_section(*key, found) for key, found in sorted(sections.items())]
    page.write_text("\n".join([INTRODUCTION, *texts]), encoding="utf-8")
    return page


def _protocol(budget: Budget) -> str:
    """What rows of one table must share beside the steps, which a task has of its own."""
    found = ["the head has a rate of its own"] if budget.head_rate else []
    found += ["from a tuned dense model"] if budget.tuned_first else []
    return ", ".join([*found, *([f"gradients clipped at {budget.clip:g}"] if budget.clip != 1 else [])])


def _columns(table: Path, budget: Budget) -> Iterator[Column]:
    """The cases of a table, but for the dense ones, which are part of each case of their task."""
    cases: dict[str, dict[str, Cell]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mean"]:
                spread = float(row["spread"]) if row["spread"] else None
                cell = Cell(float(row["mean"]), spread, int(row["trainable"] or 0), row["fingerprint"])
                cases.setdefault(row["case"], {})[row["row"]] = cell
    for case, cells in cases.items():
        if is_dense(case):
            continue
        dense = cases.get(f"{task_of(case)} dense") or cases.get("dense") or {}
        metric = [TASKS[task_of(case)].metric] if task_of(case) in TASKS else []
        settings = [*metric, f"{budget.steps} steps"]
        several = len({cell.fingerprint for cell in cells.values()}) > 1
        head = f"[{case}]({table.with_suffix('.md').name}){' †' if several else ''}<br>{', '.join(settings)}"
        yield Column(head, {**dense, **cells}, frozenset(dense))


def _section(part: str, model: str, protocol: str, columns: Sequence[Column]) -> str:
    kind = CLASSES[part]
    rows = [name for name in kind.titles if any(name in column.cells for column in columns)]
    lines = [f"## {model}{protocol and f' ({protocol})'}: {kind.metric}, {kind.better} is better", ""]
    lines += ["| | " + " | ".join(column.head for column in columns) + " | trained |"]
    lines += ["| --- |" + " ---: |" * (len(columns) + 1)]
    for name in rows:
        trained = next(column.cells[name].trained for column in columns if name in column.cells)
        cells = [_cell(name, column, kind.better) for column in columns]
        lines.append(f"| {kind.titles[name]} | {' | '.join(cells)} | {count(trained) if trained else ''} |")
    return "\n".join([*lines, "", *_tally(rows, columns, kind), ""])


def _cell(name: str, column: Column, better: str) -> str:
    if name not in column.cells:
        return ""
    own = column.cells[name]
    text = plus_minus(own.mean, own.spread)
    if name in column.dense or not own.trained:
        return text
    as_few = [
        cell
        for other, cell in column.cells.items()
        if other not in column.dense and 0 < cell.trained <= TOLERANCE * own.trained
    ]
    return text if any(outcome(cell, own, better) == 1 for cell in as_few) else f"**{text}**"


def _tally(rows: Sequence[str], columns: Sequence[Column], kind: Any) -> list[str]:
    """How often each row of ours is better than, level with, and worse than each other one that trains."""
    ours = [name for name in rows if kind.titles[name].endswith(OURS)]
    tuned = {name for column in columns for name, cell in column.cells.items() if cell.trained} - set(ours)
    others = [name for name in rows if name in tuned.difference(*(column.dense for column in columns))]
    lines = ["Cases in which ours wins / is level / loses, beyond the spread:", ""]
    lines += ["| | " + " | ".join(kind.titles[name] for name in others) + " |", "| --- |" + " ---: |" * len(others)]
    for name in ours:
        cells = []
        for other in others:
            both = [column.cells for column in columns if {name, other} <= column.cells.keys()]
            found = [outcome(pair[name], pair[other], kind.better) for pair in both]
            cells.append(" / ".join(str(found.count(result)) for result in (1, 0, -1)))
        lines.append(f"| {kind.titles[name]} | {' | '.join(cells)} |")
    return lines if ours and others else []
