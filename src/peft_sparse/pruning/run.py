"""One run of a pruner that needs calibration data: checked as a whole, then done, then written down.

What Wanda and its kin share around their own statistics and scores; see calibration.py for the walk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_sparse.pruning.budgets import resolve_sparsities
from peft_sparse.pruning.calibration import prune_block_by_block
from peft_sparse.pruning.checks import check_batches
from peft_sparse.pruning.data import Batch
from peft_sparse.pruning.metadata import describe, record
from peft_sparse.pruning.offload import BlockMover
from peft_sparse.pruning.resume import Checkpoint, deciding_config, hash_model
from peft_sparse.pruning.targets import Names, calibrated_targets
from peft_sparse.sparsity import Pattern


@dataclass
class CalibratedRun:
    """A checked run; nothing is changed yet.

    Attributes:
        method: "wanda", "sparsegpt", ...
        pattern: what competes with what.
        targets: the linears to prune, by full name.
        sparsities: of each of them.
        batches: the calibration data.
        settings: what else the result depends on, plain values by name.
    """

    model: nn.Module
    method: str
    pattern: Pattern
    targets: dict[str, nn.Module]
    sparsities: dict[str, float]
    batches: list[Batch]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def execute(
        self,
        new_statistics: Callable[[nn.Module], Any],
        prune: Callable[[str, nn.Module, Any], None],
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        measure_error: bool = False,
        progress: bool = True,
    ) -> None:
        """Prune, and write down in the model's config what was done.

        Args:
            new_statistics, prune: as [`prune_block_by_block`] calls them.
            checkpoint_dir, device, measure_error, progress: as in [`prune_wanda`].

        Raises:
            ValueError: as [`prune_block_by_block`] and [`Checkpoint`]; the model is as it was then.
        """
        checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, self._decisive(), measure_error)
        errors = prune_block_by_block(
            self.model,
            self.batches,
            self.targets,
            new_statistics,
            prune,
            progress,
            device=device,
            checkpoint=checkpoint,
            measure_error=measure_error,
        )
        record(self.model, self._facts(), errors)

    def check(
        self, *, checkpoint_dir: str | os.PathLike[str] | None = None, device: torch.device | str | None = None
    ) -> None:
        """What [`CalibratedRun.execute`] checks before its first change. Nothing is written.

        Raises:
            ValueError: if the device is not there, or the folder is that of another run.
        """
        BlockMover(self.model, device)
        if checkpoint_dir is not None:
            Checkpoint(checkpoint_dir, self._decisive(), make=False)

    def _facts(self) -> dict[str, Any]:
        return describe(self.method, self.pattern, self.sparsities, self.batches, self.settings)

    def _decisive(self) -> dict[str, Any]:
        """All that the result depends on."""
        facts = {key: value for key, value in self._facts().items() if key not in ("version", "modules")}
        model = {"model weights": hash_model(self.model), "model config": deciding_config(self.model)}
        return facts | {"sparsity": self.sparsities} | model


def plan_run(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    method: str,
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None,
    *,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    settings: Mapping[str, Any] | None = None,
) -> CalibratedRun:
    """Check everything that can be checked before a run.

    Args:
        model, batches, sparsity, target_modules, exclude_modules: as in [`prune_wanda`].
        method, pattern, settings: see [`CalibratedRun`].

    Raises:
        ValueError: see [`calibrated_targets`], [`resolve_sparsities`] and [`check_batches`].
    """
    targets = calibrated_targets(model, pattern, target_modules, exclude_modules)
    sparsities = resolve_sparsities(targets, pattern, sparsity)
    return CalibratedRun(model, method, pattern, targets, sparsities, check_batches(batches, model), settings or {})
