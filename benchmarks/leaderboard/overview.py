"""All tables of a folder on one page: for each part and model the rows side by side, a column for each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.leaderboard import tables
from benchmarks.leaderboard.render import count, plus_minus
from benchmarks.leaderboard.summary import outcome
from benchmarks.leaderboard.tables import Column, Protocol, Section

PAGE = "overview.md"
INTRODUCTION = """\
# Overview

Made by `python -m benchmarks.leaderboard` from the tables here. The heads of the columns lead to those, which have
the zeros lost, memory and seconds a step too. Mean ± standard deviation over seeds, at the best of a few learning
rates, the same number for each row of a table.

**Bold**: no sparse row of the column that trains as few parameters (up to a tenth more) is better beyond the spread;
one that trains more may be. **†**: not all rows start from the same checkpoint, bit for bit; the table says which do.
"""
TOLERANCE = 1.1  # of the number of trained parameters: a rank is a whole number, so that none is met exactly


def write(folder: Path) -> Path | None:
    """Write the page of a folder of tables. None: it has no table."""
    sections = tables.read(folder)
    if not sections:
        return None
    page = folder / PAGE
    page.write_text("\n".join([INTRODUCTION, *map(_section, sections)]), encoding="utf-8")
    return page


def _words(protocol: Protocol) -> str:
    found = ["the head has a rate of its own"] if protocol.own_head_rate else []
    found += ["from a tuned dense model"] if protocol.tuned_first else []
    return ", ".join([*found, *([f"gradients clipped at {protocol.clip:g}"] if protocol.clip != 1 else [])])


def _section(section: Section) -> str:
    kind, columns, protocol = section.kind, section.columns, _words(section.protocol)
    rows = [name for name in kind.titles if any(name in column.cells for column in columns)]
    lines = [f"## {section.model}{protocol and f' ({protocol})'}: {kind.metric}, {kind.better} is better", ""]
    lines += ["| | " + " | ".join(column.head for column in columns) + " | trained |"]
    lines += ["| --- |" + " ---: |" * (len(columns) + 1)]
    for name in rows:
        trained = next(column.cells[name].trained for column in columns if name in column.cells)
        cells = [_cell(name, column, kind.better) for column in columns]
        lines.append(f"| {kind.titles[name]} | {' | '.join(cells)} | {count(trained) if trained else ''} |")
    return "\n".join([*lines, "", *_tally(rows, section), ""])


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


def _tally(rows: Sequence[str], section: Section) -> list[str]:
    """How often each row of ours is better than, level with, and worse than each other one that trains."""
    kind, columns = section.kind, section.columns
    ours = [name for name in rows if name in section.ours]
    tuned = {name for column in columns for name, cell in column.cells.items() if cell.trained} - set(ours)
    others = [name for name in rows if name in tuned.difference(*(column.dense for column in columns))]
    lines = ["Cases in which ours wins / is level / loses, beyond the spread:", ""]
    lines += ["| | " + " | ".join(kind.titles[name] for name in others) + " |", "| --- |" + " ---: |" * len(others)]
    for name in ours:
        cells = [tables.tally(name, other, columns, kind.better) for other in others]
        lines.append(f"| {kind.titles[name]} | {' | '.join(cells)} |")
    return lines if ours and others else []
