"""Which linears a pruner changes, checked before the first one is, and the change itself.

The targets are the linears inside the model's repeated transformer blocks, but no routers. A weight that is shared
with a module outside of them (an embedding, a tied head) is left alone: pruning it would prune that module too.
"""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sparse.linears import (
    Names,
    PackedLinear,
    bits,
    block_linears,
    check_own_weight,
    get_weight,
    in_out_features,
    linears_inside,
    linears_not_called,
    matches,
    names_in_blocks,
    not_read,
    shared_weights,
    warn_of_dense_parameters,
)
from peft_sparse.pruning.offload import OffloadableWeight
from peft_sparse.sparsity import Pattern, select_mask
from peft_sparse.tuners.field_checks import check_names


def find_targets(
    model: nn.Module,
    pattern: Pattern,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    *,
    called: bool = False,
) -> dict[str, nn.Module]:
    """The linears to prune, by full name.

    Args:
        model: any module.
        pattern: every target's in_features must suit it.
        target_modules: names of linears or the ends of names ("q_proj", "self_attn.q_proj"), or one regex that matches
            full names, as in PEFT. None: all linears inside the repeated blocks, but no routers.
        exclude_modules: what to leave out of them, given in the same way.
        called: of all linears (`target_modules=None`) take only those that are called, whose inputs can be seen, and
            warn with the names of the others.

    Raises:
        ValueError: if what should be names is none, if there is nothing to prune, or if a target carries an adapter,
            computes its weight from other tensors, has no weight in memory, holds NaN or infinity, or is too narrow
            for the pattern. Nothing is changed by this function.
    """
    _check_names(target_modules, exclude_modules)
    candidates = block_linears(model) if target_modules is None else linears_inside(model)
    if target_modules is None and called:
        candidates = _without_uncalled(model, candidates, exclude_modules)
    if target_modules is None and not candidates:
        raise ValueError(
            f"The default targets are the linears inside a model's repeated transformer blocks, but "
            f"{type(model).__name__} has no list of such blocks; name the linears to prune in `target_modules` of "
            f"`prune_magnitude`{not_read(model)}."
        )
    chosen = _chosen(candidates, target_modules, exclude_modules)
    for name, linear in chosen.items():
        _check_plain(name, linear)
    targets = _without_tied(model, chosen, named=target_modules is not None)
    if not targets:
        raise ValueError(
            f"A pruner needs at least one linear, got none in {type(model).__name__} for target_modules="
            f"{target_modules!r}, exclude_modules={exclude_modules!r} ({len(chosen)} that share a weight with another "
            f"module are left alone); its linears have names such as {list(linears_inside(model))[:3]}"
            f"{not_read(model)}."
        )
    for name, linear in targets.items():
        pattern.check_width(in_out_features(linear)[0], name)
    for name in targets:  # after all that is quickly seen
        _check_numbers(name, OffloadableWeight(model, name))
    if target_modules is None:
        _warn_of_routers(model)
        warn_of_dense_parameters(model)
    return targets


def calibrated_targets(
    model: nn.Module, pattern: Pattern, target_modules: Names | None, exclude_modules: Names | None
) -> dict[str, nn.Module]:
    """[`find_targets`], all of them inside the blocks, and by default all of them called.

    Raises:
        ValueError: if one is not.
    """
    targets = find_targets(model, pattern, target_modules, exclude_modules, called=True)
    inside = block_linears(model, routers=True)
    outside = [name for name in targets if name not in inside]
    if outside:
        blocks = "outside of them" if inside else f"and {type(model).__name__} has no list of such blocks"
        raise ValueError(
            "Calibration goes from one of a model's repeated blocks to the next and prunes the linears inside them, "
            f"got `{outside[0]}`, {blocks}; take it out of `target_modules`, or prune it with `prune_magnitude`."
        )
    return targets


def _check_names(target_modules: Names | None, exclude_modules: Names | None) -> None:
    check_names("target_modules", target_modules)
    check_names("exclude_modules", exclude_modules)
    if target_modules == "all-linear":
        raise ValueError(
            "`target_modules` has names of linears or a regex for them, got 'all-linear', which is for adapters; "
            "leave it out for all linears inside the model's blocks, or name those outside of them, too."
        )


def _chosen(
    candidates: dict[str, nn.Module], target_modules: Names | None, exclude_modules: Names | None
) -> dict[str, nn.Module]:
    """The linears that are named and not excluded. Warns of names that name none of them."""
    named = [name for name in candidates if target_modules is None or matches(target_modules, name)]
    excluded = [name for name in named if exclude_modules is not None and matches(exclude_modules, name)]
    if exclude_modules is not None and not excluded:
        warnings.warn(
            f"`exclude_modules` names linears to leave alone, got {exclude_modules!r}, which is none.", stacklevel=4
        )
    listed = [] if target_modules is None or isinstance(target_modules, str) else sorted(target_modules)
    unknown = [end for end in listed if not any(matches([end], name) for name in candidates)]
    if named and unknown:
        warnings.warn(
            f"`target_modules` names linears to prune, got {unknown!r}, which are none; the others are pruned.",
            stacklevel=4,
        )
    return {name: candidates[name] for name in named if name not in excluded}


def _without_uncalled(model: nn.Module, linears: dict[str, nn.Module], excluded: Names | None) -> dict[str, nn.Module]:
    not_called = linears_not_called(model)
    left_out = [n for n in linears if n in not_called and (excluded is None or not matches(excluded, n))]
    if not left_out or len(left_out) == len(linears):
        return linears
    warnings.warn(
        f"Calibration needs inputs of the linears that it prunes, so {len(left_out)} of {len(linears)} stay dense by "
        f"default: {names_in_blocks(left_out)}, whose weight {not_called[left_out[0]]} takes without calling it, or "
        "not always; `prune_magnitude` needs none.",
        stacklevel=4,
    )
    return {name: linear for name, linear in linears.items() if name not in left_out}


def _without_tied(model: nn.Module, targets: dict[str, nn.Module], named: bool) -> dict[str, nn.Module]:
    """Warns if a linear is left alone that was asked for."""
    shared, pruned = shared_weights(model), set(targets.values())
    others = {
        name: other
        for name, linear in targets.items()
        for other, module in reversed(shared.get(linear, {}).items())
        if module not in pruned
    }
    alone = {name: linear for name, linear in targets.items() if name not in others}
    if named and others and alone:
        name, other = next(iter(others.items()))
        warnings.warn(
            f"A weight is pruned where it belongs to pruned linears alone, got `{name}` ({len(others)} in all), whose "
            f"weight is also that of `{other}`, and is left alone. To prune it, give the linear one of its own, "
            "`module.weight = torch.nn.Parameter(module.weight.clone())` (for a head that is tied to the embeddings "
            "also `model.config.tie_word_embeddings = False`).",
            stacklevel=4,
        )
    return alone


def _warn_of_routers(model: nn.Module) -> None:
    if routers := block_linears(model, routers=True).keys() - block_linears(model).keys():
        warnings.warn(
            f"By default no routers and gates of experts are pruned, so {len(routers)} linears stay dense, such as "
            f"`{min(routers)}`; to prune them, name them in `target_modules`, beside the others.",
            stacklevel=4,
        )


def _check_plain(name: str, linear: nn.Module) -> None:
    if isinstance(linear, BaseTunerLayer):
        raise ValueError(
            f"A pruner changes plain linears, got `{name}`, which carries an adapter ({type(linear).__name__}); call "
            "`merge_and_unload()` first, or prune before adding the adapter."
        )
    if isinstance(linear, PackedLinear):
        raise ValueError(
            f"A pruner changes weights with a place for each entry, got `{name}`, which is packed; call "
            "`unpack_model(model)` first, and `pack_model(model)` afterwards."
        )
    if bits(linear) is not None:
        raise ValueError(
            f"A pruner compares weights before they are quantised, got `{name}`, a {type(linear).__name__}; "
            "load the model without `quantization_config`, prune it, and call `quantize_model(model)` then."
        )
    check_own_weight(name, linear)


def _check_numbers(name: str, weight: OffloadableWeight) -> None:
    if not weight.in_memory:
        raise ValueError(
            f"A pruner changes weights in memory, got `{name}`, which is on the meta device (never loaded); load "
            "the model with its weights. What accelerate's hooks keep in CPU memory or on disk is fine."
        )
    with weight.loaded() as values:
        bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"Pruning compares finite weights, got {bad} NaN or infinite ones of {values.numel()} in `{name}`; load a "
            "sound checkpoint, or exclude it with `exclude_modules`."
        )


@torch.no_grad()
def prune_by_scores(name: str, linear: nn.Module, scores: torch.Tensor, pattern: Pattern, sparsity: float) -> None:
    """Zero the weights with the smallest scores, in place; the others keep their bits.

    Args:
        name: what messages call the linear.
        linear: nn.Linear or Conv1D.
        scores: importance (out, in).
        pattern: what competes with what.
        sparsity: share of zeros, as the pattern resolved it.

    Raises:
        ValueError: for scores that overflowed: infinite ones are all alike, and NaN has no place in an order.
    """
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise ValueError(
            f"Pruning compares finite scores, got {bad} NaN or infinite {scores.dtype} ones of {scores.numel()} in "
            f"`{name}`: weights, activations or RIA's `exponent` are too large; take a smaller exponent, or exclude "
            "it with `exclude_modules`."
        )
    group_size = pattern.group_size(scores.shape)
    mask = select_mask(scores, pattern.num_pruned(sparsity, group_size), group_size)
    get_weight(linear).masked_fill_(~mask, 0)
