"""What reports share: totals, and tables with a row for each layer, or for each place in the block of a deep model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

# A longer table is summed up: one row for all layers whose names differ in the number of the block only.
MAX_ROWS = 40

Layer = TypeVar("Layer", bound=Any)  # has a name


class Totals:
    """What every report says of all its layers, each of which has `zeros` and a `shape`."""

    layers: list[Any]

    @property
    def total_zeros(self) -> int:
        """Zeros in all layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def total_numel(self) -> int:
        """Weights in all layers."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def total_sparsity(self) -> float:
        """Share of zeros in the weights of all layers."""
        return self.total_zeros / max(self.total_numel, 1)


def table_rows(layers: Sequence[Layer], row: Callable[[str, list[Layer]], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows of some layers.

    Args:
        row: makes one from its name and the layers it stands for.
    """
    rows = [row(layer.name, [layer]) for layer in layers]
    if len(rows) <= MAX_ROWS:
        return rows
    places: dict[str, list[Layer]] = {}
    for layer in layers:
        places.setdefault(re.sub(r"\.\d+\.", ".*.", layer.name), []).append(layer)
    return [row(name, same_place) for name, same_place in places.items()]


def shape_cell(shapes: Sequence[tuple[int, ...]]) -> str:
    """For example "2 x 4", "12 of 2 x 4" or "12 of various"."""
    shape = " x ".join(f"{size:,}" for size in shapes[0]) if len(set(shapes)) == 1 else "various"
    return f"{len(shapes)} of {shape}" if len(shapes) > 1 else shape


def table(rows: list[tuple[str, ...]], align: str) -> list[str]:
    """Lines with columns of equal width.

    Args:
        rows: the first one has the titles. A column that has nothing below its title is left out.
        align: `<` or `>` for each column.

    Examples:
        >>> table([("a", "zeros"), ("bcd", "7")], "<>")
        ['a    zeros', 'bcd      7']
    """
    columns = zip(align, zip(*rows, strict=True), strict=True)
    filled = [(side, column, max(map(len, column))) for side, column in columns if any(column[1:])]
    return [
        "  ".join(f"{column[i]:{side}{width}}" for side, column, width in filled).rstrip() for i in range(len(rows))
    ]
