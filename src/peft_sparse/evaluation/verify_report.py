"""What a verification found: a row for each layer, totals, a verdict; as an object, a table and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from peft_sparse.evaluation.tables import Totals, shape_cell, table, table_rows

# Indices that a report has of each layer, lest that of a dense model be as large as the model.
MAX_INDICES = 5


@dataclass(frozen=True)
class LayerCheck:
    """One linear.

    Attributes:
        name: its full name.
        shape: (out, in).
        dtype: such as "bfloat16".
        zeros: how many of its weights are zero.
        pattern: the pattern that the zeros follow, [`find_pattern`]'s word for it.
        expected: the N:M pattern that they should follow; None: none was asked for.
        lost, gained: zeros of the reference that are no longer zero, and the other way round.
        violations: groups of M weights with more than N that are not zero.
        first_lost: (row, column) of the first few zeros lost.
        first_violations: (row, column) of the first weight of the first few such groups.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    zeros: int
    pattern: str
    expected: str | None = None
    lost: int = 0
    gained: int = 0
    violations: int = 0
    first_lost: tuple[tuple[int, int], ...] = ()
    first_violations: tuple[tuple[int, int], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no zero was lost and the expected pattern holds."""
        return not self.lost and not self.violations


@dataclass
class VerifyReport(Totals):
    """What [`peft_sparse.verify_sparsity`] found. `print` it for a table.

    Attributes:
        layers: one row for every linear layer.
        compared: whether there was a reference, without which nothing counts as lost or gained.
        notes: what a reader has to know to read the numbers right.
    """

    layers: list[LayerCheck]
    compared: bool
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no layer lost a zero or violates its pattern. Zeros gained are no fault."""
        return all(layer.ok for layer in self.layers)

    @property
    def exit_status(self) -> int:
        """For scripts, as in `sys.exit(report.exit_status)`: 0 if `ok`, else 1."""
        return 0 if self.ok else 1

    @property
    def failed(self) -> list[LayerCheck]:
        """The layers that are not ok."""
        return [layer for layer in self.layers if not layer.ok]

    @property
    def lost(self) -> int:
        """Zeros lost in all layers."""
        return sum(layer.lost for layer in self.layers)

    @property
    def gained(self) -> int:
        """Zeros gained in all layers."""
        return sum(layer.gained for layer in self.layers)

    @property
    def violations(self) -> int:
        """Groups that violate their layer's N:M pattern, in all layers."""
        return sum(layer.violations for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        names = ("ok", "exit_status", "compared", "lost", "gained", "violations", "total_zeros", "total_numel")
        totals = {name: getattr(self, name) for name in names} | {"total_sparsity": self.total_sparsity}
        layers = [asdict(layer) | {"ok": layer.ok} for layer in self.layers]
        return totals | {"notes": self.notes, "layers": layers}

    def to_json(self) -> str:
        """[`VerifyReport.to_dict`] as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        titles = ("layer", "shape", "dtype", "zeros", "sparsity", "pattern", "lost", "gained", "violations")
        rows = [titles, *table_rows(self.layers, self._row), self._row("total", self.layers)]
        lines = table(rows, "<><>><>>>")
        for layer in self.failed[:MAX_INDICES]:
            lines += _places(layer)
        rest = len(self.failed) - MAX_INDICES
        if rest > 0:
            lines.append(f"and {rest} more layers")
        return "\n".join([*lines, self._verdict(), *self.notes])

    def _row(self, name: str, layers: list[LayerCheck]) -> tuple[str, ...]:
        zeros = sum(layer.zeros for layer in layers)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        dtypes, patterns = (", ".join(sorted({getattr(x, key) for x in layers})) for key in ("dtype", "pattern"))
        lost, gained = sum(layer.lost for layer in layers), sum(layer.gained for layer in layers)
        checked = any(layer.expected for layer in layers)
        return (
            name,
            "" if name == "total" else shape_cell([layer.shape for layer in layers]),
            dtypes,
            f"{zeros:,}",
            f"{zeros / max(weights, 1):.2%}",
            patterns,
            f"{lost:,}" if self.compared else "-",
            f"{gained:,}" if self.compared else "-",
            f"{sum(layer.violations for layer in layers):,}" if checked else "-",
        )

    def _verdict(self) -> str:
        if not self.ok:
            return f"FAILED: {self.lost:,} zeros lost, {self.violations:,} groups against their pattern"
        held = ["no zero lost"] if self.compared else []
        if any(layer.expected for layer in self.layers):
            held.append("the pattern holds")
        return f"ok: {' and '.join(held)}" if held else "nothing to compare with: pass `reference` or `pattern`"


def _places(layer: LayerCheck) -> Iterator[str]:
    parts = []
    for title, places, count in (
        ("zeros lost", layer.first_lost, layer.lost),
        (f"groups against {layer.expected}", layer.first_violations, layer.violations),
    ):
        if count:
            more = f" and {count - len(places):,} more" if count > len(places) else ""
            parts.append(f"{title} at {', '.join(map(str, places))}{more}")
    yield f"{layer.name}: {'; '.join(parts)}"
