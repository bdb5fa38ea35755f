"""From single runs to the rows of a table, and what the table says about our method, losses included."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.leaderboard.plan import Line
from benchmarks.leaderboard.search import at_edge
from benchmarks.leaderboard.store import Record

# Columns of a table that are averaged over seeds, beside the metrics.
AVERAGED = ("step_seconds", "step_cpu_seconds", "peak_mb", "sparsity")
ROUNDING = 1e-6  # of a mean; models that give one answer for all have no spread over seeds
LARGEST = ("zeros_lost", "violations", "merge_difference")  # the worst of the seeds
WHERE_FROM = ("hardware", "workers", "threads", "device", "torch", "transformers", "peft", "peft_sparse", "commit")


@dataclass
class Row:
    """A line of a table.

    Attributes:
        values: the part's metric, of each seed that did not diverge.
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
        """Over the seeds; None if there is no value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of fewer than two."""
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
    prints = sorted({str(record["fingerprint"]) for record in records if record.get("fingerprint")})
    found: dict[str, Any] = {"trainable": first.get("trainable", 0), "fingerprint": " ".join(prints)}
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


class Result(Protocol):
    """What is compared: a mean over seeds and its spread, None of fewer than two."""

    @property
    def mean(self) -> float | None: ...
    @property
    def spread(self) -> float | None: ...


def gain_of(own: Result, other: Result, better: str) -> tuple[float, float] | None:
    """By how much `own` is better than `other` (negative: worse), and the spread of that difference: the root of the
    sum of both variances over seeds. None with fewer than two seeds, where nothing is called better."""
    if own.mean is None or other.mean is None or own.spread is None or other.spread is None:
        return None
    return (other.mean - own.mean) * (1 if better == "lower" else -1), math.hypot(own.spread, other.spread)


def outcome(own: Result, other: Result, better: str) -> int | None:
    """1: `own` is better beyond the spread, -1: worse, 0: within it, or but for rounding. None as of [`gain_of`]."""
    found = gain_of(own, other, better)
    if found is None:
        return None
    gain, margin = found[0], max(found[1], ROUNDING)
    return (gain > margin) - (gain < -margin)


def verdicts(rows: Sequence[Row], ours: str, rivals: Sequence[str], better: str) -> list[str]:
    """One sentence for each case and rival: ours is better, worse, or within the spread of it."""
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
            numbers = f"{own.title} {own.mean:.4g}, {other.title} {other.mean:.4g}"
            found.append(f"{case}: {numbers}: {_words(own, other, better)}.")
    return found


def _words(own: Row, other: Row, better: str) -> str:
    found = gain_of(own, other, better)
    if found is None:
        return "one seed, so no verdict"
    gain, spread = found
    result = outcome(own, other, better)
    if result == 0:
        return f"level (difference {abs(gain):.3g}, spread {spread:.2g})"
    return f"ours {'wins' if result == 1 else 'LOSES'} by {abs(gain):.3g} (spread {spread:.2g})"


# The names of cases: "wanda 2:4", "sst2 90%", and "dense" or "sst2 dense" for what starts dense and stays so.


def is_dense(case: str) -> bool:
    """Whether its rows start dense and stay so."""
    return case.rpartition(" ")[2] == "dense"


def task_of(case: str) -> str:
    """The first word of "sst2 90%"; "" for a case of one word."""
    return case.rpartition(" ")[0]
