"""From single runs to the rows of a table, and what the table says about our method, losses included."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.leaderboard.plan import Line
from benchmarks.leaderboard.search import at_edge
from benchmarks.leaderboard.store import Record

# Columns of a table that are averaged over seeds, beside the metrics.
AVERAGED = ("step_seconds", "step_cpu_seconds", "peak_mb", "sparsity")
LARGEST = ("zeros_lost", "violations", "merge_difference")  # the worst of the seeds
WHERE_FROM = ("hardware", "workers", "threads", "device", "torch", "transformers", "peft", "peft_sparse", "commit")


@dataclass
class Row:
    """A line of a table.

    Attributes:
        values: the metric of each seed; the first of `metrics` decides.
        spread: standard deviation over the seeds; None of fewer than two.
        rates: the learning rates that the search chose.
        at_edge: the best rate was the highest or lowest of those tried, so a better one may lie beyond.
        columns: everything else, by name.
    """

    case: str
    row: str
    title: str
    values: list[float]
    rates: tuple[float, ...]
    at_edge: bool
    seeds: int
    status: str = "done"
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def rows_of(lines: Sequence[Line], records: Mapping[str, Record], titles: Mapping[str, str], metric: str) -> list[Row]:
    """The rows of which at least one final run is there, and those that a method refused."""
    found = []
    for line in lines:
        tried = line.tried(records)
        title = titles[line.row]
        if line.is_unsupported(records):
            found.append(Row(line.case, line.row, title, [], (), False, 0, status="not supported"))
            continue
        done = [records[trial.key] for trial in line.finals(records) if trial.key in records]
        if not done:
            continue
        rates, edge = line.best(records) or (), bool(line.start) and at_edge(tried)
        good = [record for record in done if record["status"] == "done"]
        row = Row(line.case, line.row, title, [record[metric] for record in good], rates, edge, len(done))
        if len(good) < len(done):
            row.status = f"{len(done) - len(good)} of {len(done)} seeds diverged"
        if good:
            row.columns = _columns(good)
        found.append(row)
    return found


def _columns(records: list[Record]) -> dict[str, Any]:
    first = records[0]
    found: dict[str, Any] = {"trainable": first.get("trainable", 0), "fingerprint": first.get("fingerprint")}
    for name, value in first.items():
        if name.startswith(("acc_", "zeroshot", "BLEU")) and isinstance(value, (int, float)):
            values = [record[name] for record in records]
            found[name] = statistics.fmean(values)
            found[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    for name in AVERAGED:
        values = [record[name] for record in records if record.get(name) is not None]
        found[name] = statistics.fmean(values) if values else None
    for name in LARGEST:
        values = [record[name] for record in records if record.get(name) is not None]
        found[name] = max(values) if values else None
    return found | {name: first.get(name) for name in WHERE_FROM}


def verdicts(rows: Sequence[Row], ours: str, rivals: Sequence[str], better: str) -> list[str]:
    """One sentence for each case and rival: ours is better, worse, or within the spread of it.

    The spread of a difference is the root of the sum of both variances over seeds; with fewer than two seeds
    nothing is called better.
    """
    found = []
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.row] = row
    for case, several in by_case.items():
        own = several.get(ours)
        if own is None or own.mean is None:
            continue
        for rival in rivals:
            other = several.get(rival)
            if other is None or other.mean is None:
                continue
            gain = (other.mean - own.mean) * (1 if better == "lower" else -1)
            numbers = f"{own.title} {own.mean:.4g}, {other.title} {other.mean:.4g}"
            found.append(f"{case}: {numbers}: {_word(gain, own, other)}.")
    return found


def _word(gain: float, own: Row, other: Row) -> str:
    if own.spread is None or other.spread is None:
        return "one seed, so no verdict"
    spread = math.hypot(own.spread, other.spread)
    if abs(gain) <= spread:
        return f"level (difference {abs(gain):.3g}, spread {spread:.2g})"
    return f"ours {'wins' if gain > 0 else 'LOSES'} by {abs(gain):.3g} (spread {spread:.2g})"
