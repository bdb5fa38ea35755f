"""Which sparsity each linear gets: the same one, one by name, or by outliers (OWL, Yin et al., ICML 2024).

OWL measures the dense model: the outlier ratio of a block is the share of the entries of |W_ij| * ||X_j||_2, over all
linears of the block, that are above M times their mean. See sparsity/budgets.py for what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_sparse.linears import find_block_lists, in_out_features
from peft_sparse.pruning.calibration import evaluation_mode, without_cache
from peft_sparse.pruning.checks import check_batches
from peft_sparse.pruning.data import Batch
from peft_sparse.pruning.offload import OffloadableWeight
from peft_sparse.pruning.statistics import empty_norms
from peft_sparse.pruning.targets import Names, calibrated_targets, find_targets
from peft_sparse.pruning.walk import Walk
from peft_sparse.sparsity import (
    NM,
    LayerSize,
    Pattern,
    Unstructured,
    check_sparsity,
    check_sparsity_mapping,
    is_finite_number,
    owl_sparsities,
    sparsities_by_name,
    uniform_sparsities,
    wanda_importance,
)


def resolve_sparsities(
    targets: Mapping[str, nn.Module],
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None,
    default: float = 0.5,
) -> dict[str, float]:
    """The sparsity of every target.

    Args:
        targets: linears by full name.
        pattern: an N:M pattern fixes the sparsity of all.
        sparsity: one for all; or a mapping from full names, ends of names or regexes for them, as in PEFT's
            `rank_pattern`: a full name counts first, then the first key that matches.
        default: where `sparsity` is None.

    Returns:
        Full name to sparsity, one for each target.

    Raises:
        ValueError: for a sparsity outside [0, 1); for a mapping that leaves out a target, has a key that matches none,
            or stands beside an N:M pattern.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(targets, pattern.resolve_sparsity(sparsity, default))
    if isinstance(pattern, NM):
        raise ValueError(
            f"The pattern {pattern} fixes the sparsity of every linear at {1 - pattern.n / pattern.m:g}, got a "
            "mapping with values of its own; leave `sparsity` out, or take pattern='unstructured'."
        )
    check_sparsity_mapping("sparsity", sparsity)
    return sparsities_by_name("sparsity", sparsity, list(targets))


def uniform_sparsity(
    model: nn.Module,
    sparsity: float = 0.5,
    *,
    group: str = "layer",
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
) -> dict[str, float]:
    """A uniform budget that is met exactly: for pruners' `sparsity`, or `PstConfig.sparsity_pattern`.

    A plain number rounds down in every layer or row, so that a model has somewhat fewer zeros than asked for. Here
    some of them get one more.

    Args:
        model: any that [`prune_magnitude`] takes.
        sparsity: share of zeros in all targets together.
        group: what competes where it is used: `"layer"`, or `"row"` where every row of a layer loses the same number.
        target_modules, exclude_modules: as in [`prune_magnitude`].

    Returns:
        Full name to sparsity. Zeros sum to `int(sparsity * weights)` for `"layer"`; for `"row"` to the nearest number
        that adding or leaving one weight per row of a layer gives.

    Raises:
        ValueError: see [`prune_magnitude`].

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> budget = uniform_sparsity(model, 0.5, target_modules=["0", "1"])
        >>> [int(share * 9) for share in budget.values()]  # 9 of 18, where 0.5 by itself gives 4 and 4
        [5, 4]
    """
    check_sparsity("sparsity", sparsity)
    targets = find_targets(model, _unstructured(group), target_modules, exclude_modules)
    return uniform_sparsities(_sizes(targets, group), sparsity)


@torch.no_grad()
def owl_sparsity(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    sparsity: float = 0.6,
    *,
    lam: float = 0.08,
    outlier_threshold: float = 5.0,
    level: str = "block",
    group: str = "row",
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """An outlier-weighed budget (OWL): blocks with more outliers among |W_ij| * ||X_j||_2 stay denser.

    The sparsities of blocks lie in a range of width 2 `lam` around `sparsity`, linear in the share of their entries
    above `outlier_threshold` times their mean, and shifted so that all targets together have the asked share of zeros.

    Args:
        model: dense, with repeated blocks; nothing is changed.
        batches: calibration data, as in [`prune_wanda`].
        sparsity: share of zeros in all targets together.
        lam: lambda of the paper, which takes 0.08.
        outlier_threshold: M of the paper, which takes 5 (or 7).
        level: `"block"` as in the paper, all linear layers of a block have the same sparsity but for rounding; or
            `"linear"`, each one its own.
        group: what competes where the result is used: `"row"` (Wanda's default; every row of a layer loses the same
            number) or `"layer"` (magnitude, PST).
        target_modules, exclude_modules, device: as in [`prune_wanda`].

    Returns:
        Full name to sparsity, for a pruner's `sparsity` or `PstConfig.sparsity_pattern`. Zeros sum to
        `int(sparsity * weights)` for `"layer"`; for `"row"` to the nearest number that adding or leaving one weight
        per row of a layer gives.

    Raises:
        ValueError: if the budget needs a sparsity outside [0, 1) somewhere; for batches or targets as in
            [`prune_wanda`].

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> budget = owl_sparsity(model, [{"input_ids": torch.randint(0, 8, (2, 6))}], 0.7, group="layer")
        >>> sum(int(share * model.get_submodule(name).weight.numel()) for name, share in budget.items())
        896
    """
    check_sparsity("sparsity", sparsity)
    for name, value in (("lam", lam), ("outlier_threshold", outlier_threshold)):
        if not is_finite_number(value) or value < 0:
            raise ValueError(f"`{name}` is a finite number of at least 0, got {value!r}.")
    if level not in ("block", "linear"):
        raise ValueError(f"`level` should be 'block' or 'linear', got {level!r}.")
    targets = calibrated_targets(model, _unstructured(group), target_modules, exclude_modules)
    norms = _dense_norms(model, check_batches(batches, model), targets, device)
    groups: dict[str, list[str]] = {}
    for name in targets:
        groups.setdefault(_block_of(model, name) if level == "block" else name, []).append(name)
    outliers: dict[str, float] = {}
    for names in groups.values():
        outliers |= dict.fromkeys(names, _outlier_ratio(model, names, norms, float(outlier_threshold)))
    return owl_sparsities(outliers, _sizes(targets, group), sparsity, float(lam))


def _unstructured(group: str) -> Unstructured:
    if group not in ("layer", "row"):
        raise ValueError(f"`group` should be 'layer' or 'row', got {group!r}.")
    return Unstructured(group)


def _sizes(targets: Mapping[str, nn.Module], group: str) -> dict[str, LayerSize]:
    shapes = {name: in_out_features(linear) for name, linear in targets.items()}
    return {name: LayerSize(i * o, o if group == "row" else 1) for name, (i, o) in shapes.items()}


def _block_of(model: nn.Module, name: str) -> str:
    lists = [block_list.name for block_list in find_block_lists(model)]
    prefix = next(prefix for prefix in lists if name.startswith(f"{prefix}."))
    return f"{prefix}.{name[len(prefix) + 1 :].split('.')[0]}"


def _dense_norms(
    model: nn.Module, batches: list[Batch], targets: dict[str, nn.Module], device: torch.device | str | None
) -> dict[str, torch.Tensor]:
    """The column norms of each target's inputs in the model as it is, (in,) by full name: of sums over all tokens,
    since a mean over sequences would weigh linears that see them in one row after another as others than the rest."""
    norms: dict[str, torch.Tensor] = {}
    with evaluation_mode(model), without_cache(model), Walk(model, batches, device) as walk:
        steps = walk.find_steps(targets)
        if device is None:
            return {name: found.sum_of_squares.sqrt() for name, found in walk.gather_dense(steps, empty_norms).items()}
        for step in steps:  # each block is moved once
            with walk.mover.moved(step.block):
                gathered = walk.gather(step, empty_norms)
                norms |= {name: found.sum_of_squares.sqrt().cpu() for name, found in gathered.items()}
                if step is not steps[-1]:
                    walk.pass_on(step)
    return norms


def _outlier_ratio(model: nn.Module, names: list[str], norms: dict[str, torch.Tensor], threshold: float) -> float:
    """Share of the entries of |W_ij| * ||X_j||_2 of some linears that are above `threshold` times their mean."""
    total, numel, above = 0.0, 0, 0
    for name in names:
        with OffloadableWeight(model, name).loaded() as weight:
            total += float(wanda_importance(weight, norms[name]).sum(dtype=torch.float64))
            numel += weight.numel()
    for name in names:
        with OffloadableWeight(model, name).loaded() as weight:
            above += int((wanda_importance(weight, norms[name]) > threshold * total / numel).sum())
    return above / numel
