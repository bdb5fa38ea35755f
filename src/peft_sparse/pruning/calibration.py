"""Calibration: prune a model block by block, each block on the activations that the pruned blocks before it produce.

For every block, in the order in which the model runs them:

    1. run all batches up to this block and gather statistics of the inputs of its linears (weights still dense)
    2. prune its linears
    3. run all batches through the pruned block and keep what it returns

So each block computes twice per batch, and a run costs little more than its one block; see walk.py for how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_sparse.linears import get_weight, set_weight
from peft_sparse.pruning.walk import Batch, Walk


def check_batches(batches: Iterable[Mapping[str, torch.Tensor]]) -> list[Batch]:
    """Read the whole calibration set, which may be a generator.

    Returns:
        The batches as plain dicts.

    Raises:
        ValueError: if there are none, if one is not a dict of tensors, or if one holds NaN or infinity. In an additive
            attention mask infinity is meant, so tensors whose name ends in "mask" may hold it.
    """
    way_out = "pass an iterable of dicts as the model's forward takes them, such as [{'input_ids': ...}]"
    if isinstance(batches, (Mapping, torch.Tensor, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"Calibration takes several batches, got one {type(batches).__name__}; {way_out}.")
    checked = []
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not batch:
            raise ValueError(f"A calibration batch is a dict of tensors, got {type(batch).__name__}; {way_out}.")
        for key, value in batch.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"A calibration batch is a dict of tensors, got {type(value).__name__} for `{key}` in batch "
                    f"{index}; {way_out}."
                )
            if value.is_floating_point() and not key.endswith("mask") and not bool(value.isfinite().all()):
                raise ValueError(
                    f"Calibration needs finite inputs, got NaN or infinity in `{key}` of batch {index}; leave that "
                    "batch out."
                )
        checked.append(dict(batch))
    if not checked:
        raise ValueError(
            f"Calibration needs at least one batch, got none (a generator is used up by one loop); {way_out}."
        )
    return checked


@torch.no_grad()
def prune_block_by_block(
    model: nn.Module,
    batches: list[Batch],
    targets: dict[str, nn.Module],
    new_statistics: Callable[[nn.Module], Any],
    prune: Callable[[str, nn.Module, Any], None],
    progress: bool = True,
) -> None:
    """Gather statistics and prune, block after block.

    Args:
        model: with repeated blocks; used in evaluation mode and without caches, its modes are put back afterwards.
        batches: from [`check_batches`].
        targets: the linears to prune, inside the blocks, by full name.
        new_statistics: called with a linear; returns the empty [`Statistics`] to gather for it.
        prune: called with a linear's name, the linear and its statistics; changes the linear's weight in place.
        progress: show a bar over the blocks.

    Raises:
        ValueError: if a target gets no input, or NaN or infinity. After any error all weights are as they were.
    """
    originals: dict[str, torch.Tensor] = {}
    with evaluation_mode(model), _without_cache(model), ExitStack() as replaced:
        walk = Walk(model, batches)
        steps = walk.find_steps(targets)
        try:
            for step in tqdm(steps, desc="Pruning", unit="block", disable=not progress):
                statistics = walk.gather(step, new_statistics)
                for name, linear in step.linears.items():
                    originals[name] = get_weight(linear).detach().to("cpu", copy=True)
                    prune(name, linear, statistics[name])
                if walk.answers and step is not steps[-1]:
                    walk.finish(step, [walk.output_of(step, index) for index in range(len(batches))], replaced)
        except BaseException:
            for name, weight in reversed(originals.items()):  # of two copies of a shared weight the first one is right
                set_weight(targets[name], weight)
            raise


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
def _without_cache(model: nn.Module) -> Iterator[None]:
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
