"""What a pruner would do with its arguments, found and checked without pruning: for dry runs."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from peft_sparse.pruning import PRUNERS
from peft_sparse.pruning.budgets import resolve_sparsities
from peft_sparse.pruning.run import plan_run
from peft_sparse.pruning.targets import find_targets
from peft_sparse.sparsity import Pattern, pattern_with_group

# What competes where `group` is None, as in the pruners.
_GROUPS = {"magnitude": "layer", "wanda": "row", "sparsegpt": "layer", "ria": "layer"}


def pruning_pattern(
    method: str,
    pattern: str | Pattern = "unstructured",
    group: str | None = None,
    sparsity: float | Mapping[str, float] | None = None,
) -> Pattern:
    """The pattern that a pruner makes of its arguments, before anything is loaded.

    Raises:
        ValueError: if it is none, or the sparsity does not suit it.
    """
    parsed: Pattern = pattern_with_group(pattern, group, default=_GROUPS[method])
    parsed.resolve_sparsity(None if isinstance(sparsity, Mapping) else sparsity, 0.5)
    return parsed


def plan_pruning(
    model: nn.Module,
    method: str,
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """The sparsity of each linear that would be pruned, by full name.

    Args:
        method: a key of `PRUNERS`.
        pattern: from [`pruning_pattern`].
        model, sparsity: as in [`prune_wanda`].
        **arguments: others of the pruner.

    Raises:
        ValueError: as the pruner would. Nothing is written.
    """
    names: Any = {key: arguments.get(key) for key in ("target_modules", "exclude_modules")}
    if method == "magnitude":
        return resolve_sparsities(find_targets(model, pattern, **names), pattern, sparsity)
    settings = {key: arguments.get(key, default) for key, default in _own_settings(method).items()}
    batches: Any = arguments["batches"]
    run = plan_run(model, batches, method, pattern, sparsity, settings=settings, **names)
    run.check(checkpoint_dir=arguments.get("checkpoint_dir"), device=arguments.get("device"))
    return run.sparsities


def _own_settings(method: str) -> dict[str, Any]:
    """The parameters that a pruner has beside those of all that calibrate, with their defaults."""
    parameters, common = (signature(PRUNERS[name]).parameters for name in (method, "wanda"))
    return {name: parameter.default for name, parameter in parameters.items() if name not in common}
