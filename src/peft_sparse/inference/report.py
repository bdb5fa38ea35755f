"""What was chosen for each layer, and why; as an object, a table and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from peft_sparse.evaluation.strict_json import strict_json
from peft_sparse.evaluation.tables import shape_cell, table, table_rows

MB = 1e6


@dataclass(frozen=True)
class TokenChoice:
    """What one layer uses for a number of tokens.

    Attributes:
        tokens: how many are multiplied at a time.
        chosen: `"dense"`, `"packed"` (unpacked for each forward), or an operand: `"csr"`, `"semi_structured"`,
            `"bitmask"`.
        ratios: time relative to that of the dense layer, of each way that was timed; the worst of all that was
            measured. Empty if nothing was.
        again: the ratio of the chosen one to the layer's own way when it was measured again; None: not needed.
        reason: in words.
    """

    tokens: int
    chosen: str
    ratios: dict[str, float]
    again: float | None
    reason: str

    @property
    def speed_up(self) -> float | None:
        """How many times faster than dense the chosen way is; None if it was not timed."""
        ratio = self.ratios.get(self.chosen)
        return None if ratio is None else 1 / ratio


@dataclass(frozen=True)
class LayerChoice:
    """One linear.

    Attributes:
        name: its full name.
        shape: (out, in).
        dtype, device: such as "float32", "cpu".
        sparsity: share of zeros.
        form: `"dense"` or `"packed"`: how the layer holds its weight now.
        choices: for each number of tokens.
        weight_bytes: of the weight in that form.
        added_bytes: of what the layer keeps beside it to compute with.
        reason: why it is not accelerated at all, or what could not be tried.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    device: str
    sparsity: float
    form: str
    choices: tuple[TokenChoice, ...]
    weight_bytes: int
    added_bytes: int
    reason: str

    @property
    def accelerated(self) -> bool:
        """Whether it computes otherwise than before for any number of tokens."""
        return any(choice.chosen != self.form for choice in self.choices)


@dataclass
class AccelerationReport:
    """What [`peft_sparse.accelerate_sparse`] chose. `print` it for a table.

    Attributes:
        layers: one row for every linear layer.
        threads: of torch, with which it was measured.
        notes: what a reader has to know to read the numbers right.
    """

    layers: list[LayerChoice]
    threads: int
    notes: list[str] = field(default_factory=list)

    @property
    def accelerated(self) -> list[LayerChoice]:
        """The layers that compute otherwise than before."""
        return [layer for layer in self.layers if layer.accelerated]

    @property
    def weight_bytes(self) -> int:
        """Of the weights of all layers in the report."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def added_bytes(self) -> int:
        """What all layers keep beside their weights."""
        return sum(layer.added_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        layers = []
        for layer in self.layers:
            choices = [asdict(choice) | {"speed_up": choice.speed_up} for choice in layer.choices]
            own = asdict(layer) | {"shape": list(layer.shape), "accelerated": layer.accelerated, "choices": choices}
            layers.append(own)
        sizes = {"weight_bytes": self.weight_bytes, "added_bytes": self.added_bytes}
        totals = {"accelerated": len(self.accelerated), "threads": self.threads}
        return totals | sizes | {"notes": self.notes, "layers": layers}

    def to_json(self) -> str:
        """[`AccelerationReport.to_dict`] as text."""
        return strict_json(self.to_dict())

    def __str__(self) -> str:
        counts = sorted({choice.tokens for layer in self.layers for choice in layer.choices})
        titles = ["layer", "shape", "zeros", *(f"{count} token" + "s" * (count > 1) for count in counts), "why not"]
        rows = table_rows(self.layers, lambda name, layers: _row(name, layers, counts))
        lines = table([tuple(titles), *rows], "<>>" + "<" * len(counts) + "<")
        lines.append(
            f"{len(self.accelerated)} of {len(self.layers)} layers accelerated, with {self.threads} threads; weights "
            f"{self.weight_bytes / MB:,.1f} MB and beside them {self.added_bytes / MB:,.1f} MB"
        )
        return "\n".join([*lines, *self.notes])


def _row(name: str, layers: list[LayerChoice], counts: list[int]) -> tuple[str, ...]:
    zeros = sorted({f"{layer.sparsity:.0%}" for layer in layers}, key=lambda cell: float(cell[:-1]))
    cells = (name, shape_cell([layer.shape for layer in layers]), " to ".join(dict.fromkeys((zeros[0], zeros[-1]))))
    reasons = sorted({layer.reason for layer in layers} - {""})
    why_not = "; ".join(reasons[:2]) + (" ..." if len(reasons) > 2 else "")
    return (*cells, *(_cell(layers, count) for count in counts), why_not)


def _cell(layers: list[LayerChoice], count: int) -> str:
    """Such as "csr 3.9x" or "csr 1.2x to 1.4x, dense"."""
    found: dict[str, list[float]] = {}
    for choice in (choice for layer in layers for choice in layer.choices if choice.tokens == count):
        speed_ups = found.setdefault(choice.chosen, [])
        if choice.speed_up is not None and choice.chosen != "dense":
            speed_ups.append(choice.speed_up)
    cells = []
    for name, speed_ups in found.items():
        ends = dict.fromkeys([f"{min(speed_ups):.1f}x", f"{max(speed_ups):.1f}x"]) if speed_ups else {}
        cells.append(f"{name} {' to '.join(ends)}" if ends else name)
    return ", ".join(cells)
