"""Which runs there are, and who makes them: each row is searched, then run with every seed at its best rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.leaderboard.search import Rates, next_rates
from benchmarks.leaderboard.settings import FINAL, SEARCH, SEARCH_SEED, Budget, Diverged, Trial, Unsupported
from benchmarks.leaderboard.store import Record, Store

WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Line:
    """A row of the table of one case.

    Attributes:
        start: the first learning rates to try; empty for a row that is not trained, which needs one run.
        seeds: of the final runs.
    """

    part: str
    model: str
    case: str
    row: str
    start: Rates
    seeds: tuple[int, ...]
    budget: Budget

    def trial(self, stage: str, rates: Rates, seed: int) -> Trial:
        """A run of this row."""
        return Trial(self.part, self.model, self.case, self.row, stage, rates, seed, self.budget)

    def tried(self, records: Mapping[str, Record]) -> list[tuple[Rates, float]]:
        """(rates, score) of the runs of the search that are done."""
        found = []
        while (rates := next_rates(found, self.start, self.budget.tries)) is not None:
            record = records.get(self.trial(SEARCH, rates, SEARCH_SEED).key)
            if record is None:
                break
            found.append((rates, float("inf") if record["score"] is None else record["score"]))
        return found

    def best(self, records: Mapping[str, Record]) -> Rates | None:
        """The rates that the search has found; None: it is not at its end."""
        if not self.start:
            return ()
        tried = self.tried(records)
        return min(tried, key=lambda pair: pair[1])[0] if len(tried) == self.budget.tries else None

    def finals(self, records: Mapping[str, Record]) -> list[Trial]:
        """The runs that make the row; empty as long as its rate is searched."""
        rates = self.best(records)
        if rates is None:
            return []
        return [self.trial(FINAL, rates, seed) for seed in (self.seeds if self.start else self.seeds[:1])]

    def is_unsupported(self, records: Mapping[str, Record]) -> bool:
        """Whether the method has refused this kind of model."""
        first = self.trial(SEARCH, self.start, SEARCH_SEED)
        return records.get(first.key, {}).get("status") == "unsupported"

    def open_trials(self, records: Mapping[str, Record]) -> list[Trial]:
        """The runs that can be made now: the next try, or the seeds that are missing."""
        if self.is_unsupported(records):
            return []
        finals = self.finals(records)
        if finals:
            return [trial for trial in finals if trial.key not in records]
        rates = next_rates(self.tried(records), self.start, self.budget.tries)
        return [] if rates is None else [self.trial(SEARCH, rates, SEARCH_SEED)]


def work(
    store: Store,
    lines: Sequence[Line],
    run: Callable[[Trial], dict[str, Any]],
    deadline: float | None = None,
    say: Callable[[str], None] = print,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Make runs until none is left.

    Args:
        run: from a run to what was measured: at least `score`, lower is better.
        facts: what else goes into each record: hardware, versions.
        deadline: `time.monotonic()` after which no run is begun.

    Returns:
        How many runs this process made.
    """
    made = 0
    while deadline is None or time.monotonic() < deadline:
        records = store.records()
        open_trials = [trial for line in lines for trial in line.open_trials(records)]
        if not open_trials:
            break
        if _make_one(store, open_trials, run, say, facts or {}):
            made += 1
        else:
            time.sleep(WAIT_SECONDS)  # all of them are being made by others, and may open new ones
    return made


def _make_one(
    store: Store,
    trials: Iterable[Trial],
    run: Callable[[Trial], dict[str, Any]],
    say: Callable[[str], None],
    facts: Mapping[str, Any],
) -> bool:
    for trial in trials:
        with store.claim(trial.key) as mine:
            if not mine or trial.key in store.records():
                continue
            start = time.perf_counter()
            record = _measure(trial, run)
            store.add(trial.record(**record, total_seconds=time.perf_counter() - start, **facts))
            score = record["status"] if record["score"] is None else f"{record['score']:.4g}"
            say(f"{trial}: {score}, {time.perf_counter() - start:.1f} s")
            return True
    return False


def _measure(trial: Trial, run: Callable[[Trial], dict[str, Any]]) -> dict[str, Any]:
    """What a run measured. A refusal and a loss that is no number are results; any other error is a bug and stops."""
    try:
        return {"status": "done", **run(trial)}
    except Diverged as error:
        return {"status": "diverged", "score": None, "message": str(error)}
    except Unsupported as error:
        return {"status": "unsupported", "score": None, "message": str(error)}
    except Exception as error:
        raise RuntimeError(f"This run failed: {trial}") from error
