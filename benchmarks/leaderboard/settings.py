"""What one run is: its name in the store, its budget, and the limits of the search."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from benchmarks import memory

SEARCH_SEED = 1234  # of the runs that choose a learning rate; no final run has it
PEAK_STEPS = memory.PEAK_STEPS
SEARCH, FINAL = "search", "final"
LATER = ("head_rate", "clip", "tuned_first")


@dataclass(frozen=True)
class Budget:
    """What every row of a table gets.

    Attributes:
        name: for file names.
        steps, batch_size, length: optimizer steps, sequences in each, tokens of each.
        tries: learning rates tried for a row.
        validation_rows: windows or examples that judge a try.
        test_rows: windows (the first) or examples (evenly chosen) of the test set for the final runs; None: all.
        zeroshot_rows: questions of each zero-shot task, the first ones; None: all; 0: no zero-shot.
        calibration_rows: sequences of `length` tokens of C4 for the pruners.
        warmup: share of the steps in which the rates rise; they fall linearly afterwards.
        head_rate: learning rate of a task's head, which starts at random, in every row; 0: that of the row's weights.
        tuned_first: steps of dense fine-tuning, after which every row starts; 0: rows start at the pretrained model.
        clip: the norm that a step's gradient is clipped at. Methods have gradients of unlike size, so at 1 some are
            clipped in most steps and others in none.
    """

    name: str
    steps: int
    batch_size: int
    length: int
    tries: int
    validation_rows: int
    test_rows: int | None
    zeroshot_rows: int | None = 0
    calibration_rows: int = 64
    warmup: float = 0.1
    head_rate: float = 0.0
    clip: float = 1.0
    tuned_first: int = 0

    def __post_init__(self) -> None:
        for steps in (self.steps, self.tuned_first or self.steps):
            if steps <= PEAK_STEPS:
                raise SystemExit(f"A run has more than {PEAK_STEPS} steps, as the first are not timed; got {steps}.")

    def change(self, **changes: float | None) -> Budget:
        """The same budget but for those of the changes that are not None, with a name that says so.

        Raises:
            SystemExit: for a number below 1, a rate below 0, or a norm that is not above 0.
        """
        given = {name: value for name, value in changes.items() if value not in (None, getattr(self, name))}
        for name, value in given.items():
            least = 0 if name in ("head_rate", "clip", "tuned_first") else 1
            if not (least <= value < math.inf) or (name == "clip" and value == 0):
                rule = "above 0" if name == "clip" else f"at least {least}"
                raise SystemExit(f"--{name.replace('_', '-')} is {rule}, got {value}.")
        if not given:
            return self
        named = "-".join(f"{name.replace('_', '')}{value:g}" for name, value in sorted(given.items()))
        return replace(self, name=f"{self.name}-{named}", **given)

    def as_dict(self) -> dict[str, Any]:
        """What a run is named by. Without `head_rate` and `tuned_first` where they are 0, and `clip` where it is 1:
        runs that were made before these were there keep their names."""
        later = {field.name: field.default for field in fields(self) if field.name in LATER}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True)
class Trial:
    """One training run and its measurement.

    Attributes:
        part, model, case, row: where it stands: "causal-lm", "stories260k-llama", "wanda 2:4", "spp".
        stage: SEARCH (measured on the validation part) or FINAL (on the test set).
        rates: learning rates; of a row that is not trained none.
        seed: of the adapter's start and of the batches.
        budget: see [`Budget`].
    """

    part: str
    model: str
    case: str
    row: str
    stage: str
    rates: tuple[float, ...]
    seed: int
    budget: Budget

    @property
    def key(self) -> str:
        """Tells this run from all others; the same in every process."""
        text = json.dumps(self._settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def record(self, **measured: Any) -> dict[str, Any]:
        """What goes into the store."""
        return {"key": self.key, **self._settings(), **measured}

    def _settings(self) -> dict[str, Any]:
        return asdict(self) | {"budget": self.budget.as_dict()}

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:.2g}" for rate in self.rates)
        return f"{self.case} | {self.row} | {self.stage}{f' {rates}' if rates else ''} | seed {self.seed}"


class Unsupported(Exception):
    """A method that refuses this kind of model; the table says so instead of leaving the row out."""


class Diverged(Exception):
    """A loss that is no number: the learning rate was too high."""
