"""Where the zeros of a model are: a row for every linear, its sparsity, and the pattern that its zeros follow.

The sparsity of a model is the share of zeros in the weights of the linears inside its transformer blocks, the weights
that pruners and tuners of this package work on. What lies outside (embeddings, norms, biases, head) is stated beside
it and not counted, since a share of all parameters would depend on the size of the vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_sparse.evaluation.tables import Totals, shape_cell, table, table_rows
from peft_sparse.evaluation.weights import linear_weights
from peft_sparse.sparsity import find_pattern
from peft_sparse.storage import own_name


@dataclass(frozen=True)
class LayerSparsity:
    """One linear: its full name, (out, in), the zeros of its weight, and [`find_pattern`]'s word for them.

    `error` is how far its output moved when it was pruned, relative to its size, on the calibration data; None unless
    the pruner measured it.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    pattern: str
    error: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / max(self.numel, 1)


@dataclass
class SparsityReport(Totals):
    """The zeros of a model. `print` it for a table.

    Attributes:
        layers: one row for every linear layer.
        outside: parameters that are not counted.
        outside_zeros: how many of them are zero.
        notes: what a reader has to know to read the numbers right.
    """

    layers: list[LayerSparsity]
    outside: int = 0
    outside_zeros: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def pattern(self) -> str:
        """The pattern of all layers, or `"mixed"`."""
        patterns = {layer.pattern for layer in self.layers}
        return patterns.pop() if len(patterns) == 1 else "mixed"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        layers = [asdict(layer) | {"shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers]
        totals = {"total_zeros": self.total_zeros, "total_numel": self.total_numel, "pattern": self.pattern}
        outside = {"outside": self.outside, "outside_zeros": self.outside_zeros, "notes": self.notes}
        return {"total_sparsity": self.total_sparsity, **totals, **outside, "layers": layers}

    def __str__(self) -> str:
        rows = table_rows(self.layers, _row)
        total = ("total", "", f"{self.total_zeros:,}", f"{self.total_sparsity:.2%}", self.pattern, "")
        lines = table([("layer", "shape", "zeros", "sparsity", "pattern", "error"), *rows, total], "<>>><<")
        share = self.outside_zeros / max(self.outside, 1)
        lines.append(f"not counted: {self.outside:,} parameters outside of these weights, {share:.2%} of them zero")
        return "\n".join([*lines, *self.notes])


def sparsity_report(model_or_path: nn.Module | str | Path) -> SparsityReport:
    """Count the zeros of a model's linear layers.

    Args:
        model_or_path: a model, a folder with its safetensors files, dense or packed, or a repository on the Hub; files
            are read tensor by tensor. With unmerged adapters the weights are those that the forward uses, the active
            adapters included. Routers and gates of experts are not counted. A model without repeated transformer
            blocks is reported with all of its linear layers.

    Returns:
        A [`SparsityReport`]; layers are in the model's order.

    Raises:
        ValueError: if the path is no folder with a model's safetensors, or if there is no linear layer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 0.0, 1.0, 2.0], [3.0, 0.0, 0.0, 4.0]]))
        >>> _ = model[1].weight.data.fill_(1.0), model[1].bias.data.fill_(1.0)
        >>> print(sparsity_report(model))
        layer  shape  zeros  sparsity  pattern
        0      2 x 4      4    50.00%  2:4
        1      3 x 2      0     0.00%  dense
        total             4    28.57%  mixed
        not counted: 3 parameters outside of these weights, 0.00% of them zero
    """
    weights = linear_weights(model_or_path)
    layers = [_layer(name, weights.read(name), weights.errors.get(own_name(name))) for name in weights.names]
    report = SparsityReport(layers, notes=weights.notes)
    for tensor in weights.outside():
        report.outside += tensor.numel()
        report.outside_zeros += int((tensor == 0).sum())
    return report


def _layer(name: str, weight: torch.Tensor, error: float | None) -> LayerSparsity:
    out_features, in_features = weight.shape
    return LayerSparsity(name, (out_features, in_features), int((weight == 0).sum()), find_pattern(weight), error)


# The table


def _row(name: str, layers: list[LayerSparsity]) -> tuple[str, ...]:
    zeros = sum(layer.zeros for layer in layers)
    lowest, highest = min(layer.sparsity for layer in layers), max(layer.sparsity for layer in layers)
    sparsity = f"{lowest:.2%}" if f"{lowest:.2%}" == f"{highest:.2%}" else f"{lowest:.2%} to {highest:.2%}"
    patterns = ", ".join(sorted({layer.pattern for layer in layers}))
    errors = sorted(layer.error for layer in layers if layer.error is not None)
    error = f"{errors[0]:.3f}" if errors else ""
    if errors and f"{errors[-1]:.3f}" != error:
        error += f" to {errors[-1]:.3f}"
    return (name, shape_cell([layer.shape for layer in layers]), f"{zeros:,}", sparsity, patterns, error)
