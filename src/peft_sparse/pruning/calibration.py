"""Calibration: prune a model block by block, each block on the activations that the pruned blocks before it produce.

For every block, in the order in which the model runs them:

    1. run all batches up to this block and gather statistics of the inputs of its linears (weights still dense)
    2. prune its linears
    3. run all batches through the pruned block and keep what it returns

So each block computes twice per batch, and a run costs little more than its one block; see walk.py for how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_sparse.linears import get_weight, in_out_features, set_weight
from peft_sparse.pruning.data import Batch
from peft_sparse.pruning.offload import OffloadableWeight
from peft_sparse.pruning.resume import Checkpoint, SavedBlock
from peft_sparse.pruning.walk import Step, Walk
from peft_sparse.sparsity import OutputSketch


@torch.no_grad()
def prune_block_by_block(
    model: nn.Module,
    batches: list[Batch],
    targets: dict[str, nn.Module],
    new_statistics: Callable[[nn.Module], Any],
    prune: Callable[[str, nn.Module, Any], None],
    progress: bool = True,
    *,
    device: torch.device | str | None = None,
    checkpoint: Checkpoint | None = None,
    measure_error: bool = False,
) -> dict[str, float]:
    """Gather statistics and prune, block after block.

    Args:
        model: with repeated blocks; used in evaluation mode and without caches, its modes are put back afterwards.
        batches: from [`check_batches`].
        targets: the linears to prune, inside the blocks, by full name.
        new_statistics: called with a linear; returns the empty [`Statistics`] to gather for it.
        prune: called with a linear's name, the linear and its statistics; changes the linear's weight in place.
        progress: show a bar over the blocks.
        device: where blocks run, moved there one at a time; None: where they are.
        checkpoint: where the blocks that are done are written, and read if they were done before.
        measure_error: gather an [`OutputSketch`] of every linear's inputs.

    Returns:
        With `measure_error`, the relative error of every target's output, by name; otherwise nothing.

    Raises:
        ValueError: if a target gets no input, or NaN or infinity. After any error all weights are as they were.
    """
    changes = _Changes(model, targets, prune)
    try:
        if checkpoint is not None and checkpoint.is_finished(targets):
            for name in checkpoint.blocks:
                changes.load(checkpoint.load(name))
        else:
            gathered = partial(_Gathered, new_statistics=new_statistics, measure_error=measure_error)
            with evaluation_mode(model), without_cache(model), Walk(model, batches, device) as walk:
                _prune_in_order(walk, targets, changes, gathered, checkpoint, progress)
    except BaseException:
        changes.restore()
        raise
    changes.settle()
    return changes.errors


def _prune_in_order(
    walk: Walk,
    targets: dict[str, nn.Module],
    changes: _Changes,
    gathered: Callable[[nn.Module], _Gathered],
    checkpoint: Checkpoint | None,
    progress: bool,
) -> None:
    """The loop at the top of this file, over all blocks up to the last one with targets."""
    steps = walk.find_steps(targets)
    if checkpoint is not None:
        checkpoint.set_blocks(step.name for step in steps if step.linears)
    for step in tqdm(steps, desc="Pruning", unit="block", disable=not progress):
        with walk.mover.moved(step.block):
            _prune_block(step, walk, changes, gathered, checkpoint)
            if step is not steps[-1]:
                walk.pass_on(step)


def _prune_block(
    step: Step,
    walk: Walk,
    changes: _Changes,
    gathered: Callable[[nn.Module], _Gathered],
    checkpoint: Checkpoint | None,
) -> None:
    """Prune the linears of one block, or take them from an earlier run that has done it."""
    if not step.linears:
        return
    saved = None if checkpoint is None else checkpoint.load(step.name)
    if saved is not None:
        changes.load(saved)
        return
    changes.make(step, walk.gather(step, gathered))
    if checkpoint is not None:
        checkpoint.save(step.name, *changes.of(step))


class _Changes:
    """The weights that were changed so far, each remembered as it was."""

    def __init__(
        self, model: nn.Module, targets: dict[str, nn.Module], prune: Callable[[str, nn.Module, Any], None]
    ) -> None:
        self.weights = {name: OffloadableWeight(model, name) for name in targets}
        self.prune = prune
        self.changed: list[OffloadableWeight] = []
        self.errors: dict[str, float] = {}

    def _change(self, name: str) -> OffloadableWeight:
        self.weights[name].remember()
        self.changed.append(self.weights[name])
        return self.weights[name]

    def make(self, step: Step, gathered: dict[str, _Gathered]) -> None:
        """Prune the linears of a block."""
        for name, linear in step.linears.items():
            weight, sketch = self._change(name), gathered[name].sketch
            with weight.loaded() as values:
                dense = values if sketch is None else values.detach().clone()
                self.prune(name, linear, gathered[name].statistics)
                weight.keep()
                if sketch is not None:
                    self.errors[name] = sketch.relative_error(dense, get_weight(linear).detach())

    def load(self, saved: SavedBlock | None) -> None:
        """Take the pruned weights of a block from an earlier run."""
        assert saved is not None  # checked by `is_finished`
        for name, tensor in saved.tensors.items():
            weight = self._change(name)
            with weight.loaded():
                set_weight(weight.linear, tensor)
                weight.keep()
        self.errors |= saved.errors

    def of(self, step: Step) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The weights and errors of a block that is done."""
        tensors = {}
        for name in step.linears:
            with self.weights[name].loaded() as weight:
                tensors[name] = weight.detach().to("cpu", copy=True)
        return tensors, {name: error for name, error in self.errors.items() if name in step.linears}

    def restore(self) -> None:
        """Put all weights back; of two copies of a shared weight the first one is right."""
        for weight in reversed(self.changed):
            weight.restore()

    def settle(self) -> None:
        """Let go of what is remembered."""
        for weight in self.changed:
            weight.forget()


class _Gathered:
    """A pruner's statistics of one linear's inputs, and the sketch that tells its error if that is wanted."""

    def __init__(self, linear: nn.Module, new_statistics: Callable[[nn.Module], Any], measure_error: bool) -> None:
        self.statistics = new_statistics(linear)
        in_features = in_out_features(linear)[0]
        self.sketch = OutputSketch(in_features, get_weight(linear).device) if measure_error else None

    @property
    def num_tokens(self) -> int:
        return self.statistics.num_tokens

    def update(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        self.statistics.update(x, token_mask)
        if self.sketch is not None:
            self.sketch.update(x, token_mask)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; each one gets its own mode back, after an error too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No part of a model keeps keys and values, which one forward of whole sequences has no use for."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
