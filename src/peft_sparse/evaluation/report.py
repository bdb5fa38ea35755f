"""Where the zeros of a model are: a row for every linear, its sparsity, and the pattern that its zeros follow.

The sparsity of a model is the share of zeros in the weights of the linears inside its transformer blocks, the weights
that pruners and tuners of this package work on. What lies outside (embeddings, norms, biases, head) is stated beside
it and not counted, since a share of all parameters would depend on the size of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.evaluation.errors import pruning_errors
from peft_sparse.evaluation.stored import stored_weights
from peft_sparse.linears import as_stored, block_linears, linears_inside, stored_weight, unwrap, weight_parameter
from peft_sparse.sparsity import dense_weight, find_pattern
from peft_sparse.tuners.sparse_layer import SparseLayer

# A longer table is summed up: one row for all layers whose names differ in the number of the block only.
MAX_ROWS = 40


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
class SparsityReport:
    """The zeros of a model. `print` it for a table.

    Attributes:
        layers: one row for every linear.
        outside: parameters that are not counted.
        outside_zeros: how many of them are zero.
        notes: what a reader has to know to read the numbers right.
    """

    layers: list[LayerSparsity]
    outside: int = 0
    outside_zeros: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def total_zeros(self) -> int:
        """Zeros in all linears."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def total_numel(self) -> int:
        """Weights in all linears."""
        return sum(layer.numel for layer in self.layers)

    @property
    def total_sparsity(self) -> float:
        """Share of zeros in the weights of all linears."""
        return self.total_zeros / max(self.total_numel, 1)

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
        rows = [_row(layer.name, [layer]) for layer in self.layers]
        if len(rows) > MAX_ROWS:
            rows = [_row(name, layers) for name, layers in _same_place(self.layers).items()]
        total = ("total", "", f"{self.total_zeros:,}", f"{self.total_sparsity:.2%}", self.pattern, "")
        lines = _table([("layer", "shape", "zeros", "sparsity", "pattern", "error"), *rows, total])
        share = self.outside_zeros / max(self.outside, 1)
        lines.append(f"not counted: {self.outside:,} parameters outside of these weights, {share:.2%} of them zero")
        return "\n".join([*lines, *self.notes])


def sparsity_report(model_or_path: nn.Module | str | Path) -> SparsityReport:
    """Count the zeros of a model's linears.

    Args:
        model_or_path: a model, or a folder with its safetensors files, which are read tensor by tensor. With unmerged
            adapters the weights are those that the forward uses, the active adapters included. A model without
            repeated transformer blocks is reported with all of its linears.

    Returns:
        A [`SparsityReport`]; layers are in the model's order.

    Raises:
        ValueError: if the path is no folder with a model's safetensors, or if there is no linear.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 4.0]]))
        >>> _ = model[1].weight.data.fill_(1.0), model[1].bias.data.fill_(1.0)
        >>> print(sparsity_report(model))
        layer  shape  zeros  sparsity  pattern
        0      2 x 4      4    50.00%  2:4
        1      3 x 2      0     0.00%  dense
        total             4    28.57%  mixed
        not counted: 3 parameters outside of these weights, 0.00% of them zero
    """
    if not isinstance(model_or_path, nn.Module):
        return _report_stored(Path(model_or_path))
    # Names without the prefix that PEFT puts before them.
    get_base_model = getattr(model_or_path, "get_base_model", None)
    model: nn.Module = get_base_model() if get_base_model is not None else model_or_path
    linears = block_linears(model) or linears_inside(model)
    if not linears:
        raise ValueError(f"A sparsity report needs at least one linear, got none in {type(model).__name__}.")
    layers = [_layer(name, forward_weight(linear)) for name, linear in linears.items()]
    report = SparsityReport(layers)
    counted = {id(weight_parameter(unwrap(linear))) for linear in linears.values()}
    for parameter in _parameters_without_adapters(model):
        if id(parameter) not in counted:
            report.outside += parameter.numel()
            report.outside_zeros += int((parameter == 0).sum())
    return with_errors(report, model)


def with_errors(report: SparsityReport, model_or_path: nn.Module | Path) -> SparsityReport:
    """The report with the errors that pruning left, where the config of the model tells them."""
    errors = pruning_errors(model_or_path)
    report.layers = [replace(layer, error=errors.get(layer.name)) for layer in report.layers]
    return report


@torch.no_grad()
def forward_weight(linear: nn.Module) -> torch.Tensor:
    """The weight that the forward of a linear uses, (out, in): with unmerged adapters their effect is included, unless
    they are disabled."""
    weight = stored_weight(unwrap(linear))
    if not isinstance(linear, BaseTunerLayer) or linear.merged or linear.disable_adapters:
        return dense_weight(weight)
    names = [name for name in linear.active_adapters if name in linear._get_available_adapters()]
    for name in names:
        if isinstance(linear, SparseLayer):
            weight = linear.effective_weight(name, weight)
        elif hasattr(linear, "get_delta_weight"):
            delta = as_stored(unwrap(linear), linear.get_delta_weight(name))  # back to (out, in)
            weight = dense_weight(weight) + delta
    return dense_weight(weight)


def _parameters_without_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    tuner_layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = {id(parameter) for layer in tuner_layers for parameter in layer.parameters()}
    adapters -= {id(parameter) for layer in tuner_layers for parameter in unwrap(layer).parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in adapters)


def _report_stored(path: Path) -> SparsityReport:
    report = SparsityReport([])
    for name, weight, is_layer in stored_weights(path, report.notes):
        if is_layer:
            report.layers.append(_layer(name, weight))
        else:
            report.outside += weight.numel()
            report.outside_zeros += int((weight == 0).sum())
    return with_errors(report, path)


def _layer(name: str, weight: torch.Tensor) -> LayerSparsity:
    out_features, in_features = weight.shape
    return LayerSparsity(name, (out_features, in_features), int((weight == 0).sum()), find_pattern(weight))


# The table


def _same_place(layers: list[LayerSparsity]) -> dict[str, list[LayerSparsity]]:
    places: dict[str, list[LayerSparsity]] = {}
    for layer in layers:
        places.setdefault(re.sub(r"\.\d+\.", ".*.", layer.name), []).append(layer)
    return places


def _row(name: str, layers: list[LayerSparsity]) -> tuple[str, ...]:
    zeros, shapes = sum(layer.zeros for layer in layers), {layer.shape for layer in layers}
    shape = " x ".join(f"{size:,}" for size in layers[0].shape) if len(shapes) == 1 else "various"
    lowest, highest = min(layer.sparsity for layer in layers), max(layer.sparsity for layer in layers)
    sparsity = f"{lowest:.2%}" if f"{lowest:.2%}" == f"{highest:.2%}" else f"{lowest:.2%} to {highest:.2%}"
    patterns = ", ".join(sorted({layer.pattern for layer in layers}))
    errors = sorted(layer.error for layer in layers if layer.error is not None)
    error = f"{errors[0]:.3f}" if errors else ""
    if errors and f"{errors[-1]:.3f}" != error:
        error += f" to {errors[-1]:.3f}"
    return (name, f"{len(layers)} of {shape}" if len(layers) > 1 else shape, f"{zeros:,}", sparsity, patterns, error)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    if not any(row[-1] for row in rows[1:]):  # no error was measured
        rows = [row[:-1] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    align = "<>>><<"
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False)).rstrip()
        for row in rows
    ]
