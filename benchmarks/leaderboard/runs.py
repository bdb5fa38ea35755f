"""Every single run as a CSV beside the tables, and back: a fresh clone goes on from the runs that are in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks import report
from benchmarks.leaderboard.plan import Line
from benchmarks.leaderboard.settings import Budget, Trial
from benchmarks.leaderboard.store import Record, Store

# Columns that are no numbers even where all of their characters are digits.
TEXT = ("status", "message", "fingerprint", "device", "dtype", "hardware", "commit", "date")
TEXT += ("torch", "transformers", "peft", "peft_sparse")
OWN = tuple(field.name for field in fields(Trial))


def write(lines: Sequence[Line], records: Mapping[str, Record], path: Path) -> None:
    """The runs of these rows, those of the search too; a budget is a JSON object."""
    keys = {(line.part, line.model, line.case, line.row, json.dumps(line.budget.as_dict())) for line in lines}
    rows = []
    for record in records.values():
        budget = json.dumps(record["budget"])
        if (record["part"], record["model"], record["case"], record["row"], budget) in keys:
            rates = " ".join(f"{rate:g}" for rate in record["rates"])
            rows.append({"key": record["key"], **record, "budget": budget, "rates": rates})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    report.write([{name: row.get(name) for name in columns} for row in rows], path)


def restore(path: Path, store: Store) -> int:
    """Take over the runs of a CSV that the store lacks.

    Returns:
        How many.

    Raises:
        SystemExit: for a row whose key is not that of its settings: it was changed by hand or is of another version.
    """
    known, found = store.records(), 0
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            record = _record(row, path)
            if record["key"] not in known:
                store.add(record)
                known[record["key"]] = record
                found += 1
    return found


def _record(row: dict[str, str], path: Path) -> Record:
    rates = tuple(float(rate) for rate in row["rates"].split())
    names = (row[name] for name in ("part", "model", "case", "row", "stage"))
    trial = Trial(*names, rates, int(row["seed"]), Budget(**json.loads(row["budget"])))
    if trial.key != row["key"]:
        raise SystemExit(
            f"The key of a run is made from its settings, got {row['key']} in {path.name} for {trial}, which is "
            f"{trial.key}; take the file as it was committed, or leave --restore out."
        )
    measured = {
        name: text if name in TEXT else _number(text)
        for name, text in row.items()
        if text != "" and name not in (*OWN, "key")
    }
    return trial.record(**{"score": None, **measured})


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
