"""From dense to sparse: pruners, which change a model in place and hand it back."""

from collections.abc import Callable
from typing import Any

from peft_sparse.pruning.budgets import owl_sparsity, resolve_sparsities, uniform_sparsity
from peft_sparse.pruning.data import calibration_batches
from peft_sparse.pruning.magnitude import prune_magnitude
from peft_sparse.pruning.ria import prune_ria
from peft_sparse.pruning.sources import load_rows
from peft_sparse.pruning.sparsegpt import prune_sparsegpt
from peft_sparse.pruning.wanda import prune_wanda

# By name, as command line and recipes call them.
PRUNERS: dict[str, Callable[..., Any]] = {
    "magnitude": prune_magnitude,
    "wanda": prune_wanda,
    "sparsegpt": prune_sparsegpt,
    "ria": prune_ria,
}

__all__ = [
    "PRUNERS",
    "calibration_batches",
    "load_rows",
    "owl_sparsity",
    "prune_magnitude",
    "prune_ria",
    "prune_sparsegpt",
    "prune_wanda",
    "resolve_sparsities",
    "uniform_sparsity",
]
