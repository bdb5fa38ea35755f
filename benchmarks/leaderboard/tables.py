"""The tables of a folder, read from the CSVs there, for the pages that set several side by side.

The CSVs have what was run elsewhere and at other times too. Tables that were given a name (`--name`) are looks at one
question and stay out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.leaderboard.encoders import TASKS
from benchmarks.leaderboard.parts import CLASSES, Part
from benchmarks.leaderboard.settings import Budget
from benchmarks.leaderboard.summary import is_dense, outcome, task_of

OURS = "(ours)"  # how titles of our rows end


@dataclass(frozen=True)
class Cell:
    """A row's result in one case. `spread` is None of fewer than two seeds."""

    mean: float
    spread: float | None
    trained: int
    fingerprint: str


@dataclass(frozen=True)
class Column:
    """A case of one table; `cells` by row, with those of the dense model.

    Attributes:
        file: the Markdown file of the table.
    """

    case: str
    budget: Budget
    file: str
    cells: Mapping[str, Cell]
    dense: frozenset[str]

    @property
    def head(self) -> str:
        """Leads to the table."""
        metric = [TASKS[task_of(self.case)].metric] if task_of(self.case) in TASKS else []
        several = len({cell.fingerprint for name, cell in self.cells.items() if name not in self.dense}) > 1
        before = f" after {self.budget.tuned_first:,} dense ones" if self.budget.tuned_first else ""
        settings = ", ".join([*metric, f"{self.budget.steps} steps{before}"])
        return f"[{self.case}]({self.file}){' †' if several else ''}<br>{settings}"


class Protocol(NamedTuple):
    """What rows that are compared must share beside the steps, which a task has of its own."""

    own_head_rate: bool
    tuned_first: bool
    clip: float

    @classmethod
    def of(cls, budget: Budget) -> Protocol:
        """A budget's."""
        return cls(budget.head_rate > 0, budget.tuned_first > 0, budget.clip)

    @property
    def order(self) -> tuple[bool, bool, float]:
        """The default budgets' come first."""
        return self.tuned_first, not self.own_head_rate, -self.clip


class Section(NamedTuple):
    """A model's cases of one protocol."""

    part: str
    model: str
    protocol: Protocol
    columns: list[Column]

    @property
    def kind(self) -> type[Part]:
        """The class of the part."""
        return CLASSES[self.part]

    @property
    def ours(self) -> list[str]:
        """The part's rows that are ours, variants included."""
        return [name for name, title in self.kind.titles.items() if title.endswith(OURS)]


def read(folder: Path) -> list[Section]:
    """All sections, those of a model together."""
    found: dict[tuple[str, str, Protocol], list[Column]] = {}
    for path in sorted(folder.glob("*-runs.csv")):
        table = path.with_name(path.name.replace("-runs.csv", ".csv"))
        with path.open(newline="", encoding="utf-8") as file:
            run = next(csv.DictReader(file), None)
        if run is None or not table.is_file():
            continue
        budget = Budget(**json.loads(run["budget"]))
        if table.stem == f"{run['part']}-{run['model']}-{budget.name}":
            found.setdefault((run["part"], run["model"], Protocol.of(budget)), []).extend(_columns(table, budget))
    sections = [Section(*key, columns) for key, columns in found.items()]
    return sorted(sections, key=lambda section: (section.part, section.model, section.protocol.order))


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
        if not is_dense(case):
            dense = cases.get(f"{task_of(case)} dense") or cases.get("dense") or {}
            yield Column(case, budget, table.with_suffix(".md").name, {**dense, **cells}, frozenset(dense))


def tally(own: str, other: str, columns: Sequence[Column], better: str) -> str:
    """In how many cases `own` is better than, level with, and worse than `other`, as "3 / 2 / 0"."""
    both = [column.cells for column in columns if {own, other} <= column.cells.keys()]
    found = [outcome(pair[own], pair[other], better) for pair in both]
    return " / ".join(str(found.count(result)) for result in (1, 0, -1))
