"""Who wins where: the tables at the top of the leaderboard's README, counted from the CSVs beside it.

Each stands between two comments of Markdown, so that the text around it is written by people and no number of it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.leaderboard import tables
from benchmarks.leaderboard.summary import gain_of, outcome, task_of
from benchmarks.leaderboard.tables import OURS, Column, Section

PAGE = "README.md"
END = "<!-- end -->"
MODELS = {"minilm": "MiniLM", "minilm-roberta": "MiniLM as a RoBERTa", "gpt2-byte-shakespeare": "GPT-2 of bytes"}
TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "rte": "RTE", "cola": "CoLA", "stsb": "STS-B", "e2e": "E2E"}


def write(folder: Path) -> Path | None:
    """Bring the tables of a folder's page up to date; one that the page has no place for is left out, and so are runs
    of a few steps, which show that the runner works.

    Returns:
        The page; None: the folder has none.

    Raises:
        ValueError: if the page has the comment before a table and not the one after it.
    """
    page = folder / PAGE
    if not page.is_file():
        return None
    text, sections = page.read_text(encoding="utf-8"), [_but_smoke(section) for section in tables.read(folder)]
    for name, (parts, lines) in {"SPP": (("causal-lm",), _counts), "PST": (("encoders", "nlg"), _outcomes)}.items():
        several = [section for section in sections if section.part in parts and section.columns]
        if several:
            text = _replaced(text, f"<!-- who wins: {name} -->", lines(several))
    page.write_text(text, encoding="utf-8")
    return page


def _but_smoke(section: Section) -> Section:
    kept = [column for column in section.columns if not column.budget.name.startswith("smoke")]
    return section._replace(columns=kept)


def _replaced(text: str, start: str, lines: Iterator[str]) -> str:
    before, found, rest = text.partition(start)
    inside, closed, after = rest.partition(END)
    if not found:
        return text
    if not closed or "<!-- who wins" in inside:  # what is between would be lost
        raise ValueError(f"{PAGE} has a table between {start} and {END}, got no second comment; add it.")
    return "\n".join([before + start, "", *lines, "", END + after])


def _counts(sections: Sequence[Section]) -> Iterator[str]:
    """A line for each of our rows and each clip; models are counted together."""
    titles, better = sections[0].kind.titles, sections[0].kind.better
    protocols = {section.protocol: None for section in sorted(sections, key=lambda section: section.protocol.order)}
    rivals = _rivals(sections)
    yield "| | cases | " + " | ".join(titles[name] for name in rivals) + " |"
    yield "| --- |" + " ---: |" * (len(rivals) + 1)
    for protocol in protocols:
        columns = [column for section in sections if section.protocol == protocol for column in section.columns]
        for own in sections[0].ours:
            count = sum(own in column.cells for column in columns)
            if count:
                clipped = f", all rows clipped at {protocol.clip:g}" if protocol.clip != 1 else ""
                cells = [tables.tally(own, rival, columns, better) for rival in rivals]
                yield f"| {titles[own].removesuffix(OURS).strip()}{clipped} | {count} | {' | '.join(cells)} |"


def _outcomes(sections: Sequence[Section]) -> Iterator[str]:
    """A line for each case, with what came of it against each rival."""
    rivals = _rivals(sections)
    yield "| | " + " | ".join(sections[0].kind.titles[name] for name in rivals) + " |"
    yield "| --- |" + " --- |" * len(rivals)
    for section in sections:
        for column in sorted(section.columns, key=lambda column: column.case):
            cells = [_outcome(section.kind.ours, rival, column, section.kind.better) for rival in rivals]
            if any(cells):
                yield f"| [{_title(section, column)}]({column.file}) | {' | '.join(cells)} |"


def _rivals(sections: Sequence[Section]) -> list[str]:
    """Those that some section has a result of."""
    there = {name for section in sections for column in section.columns for name in column.cells}
    return [name for name in sections[0].kind.rivals if name in there and name not in sections[0].ours]


def _outcome(own: str, rival: str, column: Column, better: str) -> str:
    if not {own, rival} <= column.cells.keys():
        return ""
    pair = column.cells[own], column.cells[rival]
    result, found = outcome(*pair, better), gain_of(*pair, better)
    if result is None or found is None:
        return "one seed"
    return "level" if result == 0 else f"{'wins' if result == 1 else '**loses**'} by {abs(found[0]):.2g}"


def _title(section: Section, column: Column) -> str:
    task, protocol = task_of(column.case), section.protocol
    one_rate = section.kind.heads and not (protocol.own_head_rate or protocol.tuned_first)
    words = [f"{MODELS.get(section.model, section.model)}, {TASKS[task]} {column.case.rpartition(' ')[2]}"]
    words += ["from a tuned model"] if protocol.tuned_first else []
    words += ["one rate for head and weights"] if one_rate else []
    if sum(other.case == column.case for other in section.columns) > 1:
        words.append(f"{column.budget.steps} steps")
    return ", ".join(words)
