"""Layerwise budgets: how many weights each layer gives up, so that all together give up exactly the asked number.

Uniform, or by outliers (OWL, Yin et al., ICML 2024, arXiv 2310.05175): with D_l the share of entries of
|W_ij| * ||X_j||_2 in block l that lie above M times their mean,

    s_l = c - 2 lambda (D_l - min D) / (max D - min D),   c such that sum_l n_l s_l = S sum_l n_l

so a block with more outliers stays denser, and the sparsities of blocks differ by at most 2 lambda. The paper centres
the plain mean of s_l; weighting by the number of weights n_l is the same for equal blocks and right for others.

A share is a float and a count is not: counts are fixed first (by largest remainders), and each share is the float from
which `int(share * size)`, as patterns compute it, gives that count back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft_sparse.sparsity.patterns import check_sparsity


@dataclass(frozen=True)
class LayerSize:
    """One layer of a budget.

    Args:
        numel: its weights.
        unit: how many of them are pruned together: 1 where the whole layer competes, out_features where every row
            loses the same number.
    """

    numel: int
    unit: int = 1

    @property
    def group_size(self) -> int:
        """Weights that compete with each other."""
        return self.numel // self.unit


def matching_key(keys: Iterable[str], name: str) -> str | None:
    """The key that a module's full name is meant by: the name itself if it is a key, else the first key that is a
    regex for the name or for its end after a dot, as in PEFT's `rank_pattern`; None if there is none.

    Examples:
        >>> matching_key(["q_proj", "layers.1.*"], "layers.1.q_proj"), matching_key(["proj"], "layers.1.q_proj")
        ('q_proj', None)
    """
    keys = list(keys)
    if name in keys:
        return name
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


def check_sparsity_mapping(argument: str, mapping: Mapping[str, float]) -> None:
    """Raises:
    ValueError: unless `mapping` goes from names or regexes to sparsities in [0, 1). `argument` is what messages call
        it."""
    for key, sparsity in mapping.items():
        if not isinstance(key, str):
            raise ValueError(f"Keys of `{argument}` are names of linears or regexes for them, got {key!r}.")
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"Keys of `{argument}` are names of linears or regexes for them, got {key!r}, which is no valid regex "
                f"({error})."
            ) from error
        check_sparsity(f"{argument}[{key!r}]", sparsity)


def sparsities_by_name(
    argument: str, mapping: Mapping[str, float], names: Sequence[str], default: float | None = None
) -> dict[str, float]:
    """The sparsity of every layer.

    Args:
        argument: what messages call the mapping.
        mapping: checked by [`check_sparsity_mapping`].
        names: full names of the layers.
        default: for names that no key means; None: that is an error.

    Raises:
        ValueError: if a key means no layer, or if a layer has no sparsity.
    """
    keys = {name: matching_key(mapping, name) for name in names}
    unused = [key for key in mapping if key not in keys.values() and not any(matching_key([key], n) for n in names)]
    if unused:
        raise ValueError(
            f"Every key of `{argument}` names at least one linear, got {', '.join(map(repr, unused[:3]))} "
            f"({len(unused)} of {len(mapping)} keys), which name none; the linears have names such as "
            f"{list(names)[:3]}."
        )
    if default is None and (missing := [name for name, key in keys.items() if key is None]):
        raise ValueError(
            f"`{argument}` as a mapping has a sparsity for every linear that is pruned, got none for "
            f"{', '.join(f'`{name}`' for name in missing[:3])} ({len(missing)} of {len(names)}); add a key for them, "
            "'.*' for all the rest, or leave them out with `exclude_modules`."
        )
    return {name: float(default if key is None else mapping[key]) for name, key in keys.items()}  # type: ignore[arg-type]


def exact_budget(wanted: Mapping[str, float], sizes: Mapping[str, LayerSize], sparsity: float) -> dict[str, float]:
    """Round the wanted sparsities of layers so that all layers together meet a budget.

    Args:
        wanted: by name of the layer; weighted by the number of weights, their mean is `sparsity`.
        sizes: of the same layers.
        sparsity: share of zeros in all layers together.

    Returns:
        Sparsities whose counts sum to `int(sparsity * total)` zeros if all units are 1, and otherwise to as near to it
        as adding or leaving one more unit brings it: at most half of the smallest unit off.

    Raises:
        ValueError: if the budget cannot be met: a wanted sparsity is outside [0, 1), or layers are so small that
            leaving one weight of each is too much.

    Examples:
        >>> sizes = {"a": LayerSize(10), "b": LayerSize(25)}
        >>> exact_budget({"a": 0.35, "b": 0.36}, sizes, 12.5 / 35)  # 12 of 35: 3.5 and 9.0, of which 3 and 9
        {'a': 0.3, 'b': 0.36}
    """
    for name, value in wanted.items():
        if not -1e-12 <= value < 1:
            raise ValueError(
                f"A budget of {sparsity:g} over all layers is met with a sparsity in [0, 1) in each, got {value:.4g} "
                f"for `{name}`; ask for another `sparsity`, or for less difference between the layers (a smaller "
                "`lam`). Nothing was changed."
            )
    # 1e-9 as in NM.num_pruned: a product that floating point leaves just below a whole number means that number.
    ideal = {name: max(value, 0.0) * sizes[name].group_size for name, value in wanted.items()}
    counts = {name: math.floor(count + 1e-9) for name, count in ideal.items()}
    missing = int(sparsity * sum(size.numel for size in sizes.values()))
    missing -= sum(count * sizes[name].unit for name, count in counts.items())
    for name in sorted(counts, key=lambda name: counts[name] - ideal[name]):  # largest remainder first
        missing -= _add_units(counts, sizes, name, 1 if missing > 0 else -1, missing)
    before = None
    while missing != before:  # what the remainders could not settle: coarse units, layers that are full
        before = missing
        for name in sorted(counts, key=lambda name: -sizes[name].unit):
            missing -= _add_units(
                counts, sizes, name, int(missing / sizes[name].unit) or (1 if missing > 0 else -1), missing
            )
    if missing > max(size.unit for size in sizes.values()) / 2:
        raise ValueError(
            f"A budget of {sparsity:g} over all layers leaves at least one weight of each group of weights that are "
            f"compared, got {missing} more to prune than there are; ask for a lower `sparsity`. Nothing was changed."
        )
    return {name: share_of_count(count, sizes[name]) for name, count in counts.items()}


def _add_units(counts: dict[str, int], sizes: Mapping[str, LayerSize], name: str, units: int, missing: int) -> int:
    """Prune `units` more units of a layer if that comes nearer to the budget; returns the weights that this adds."""
    size = sizes[name]
    units = max(-counts[name], min(units, size.group_size - 1 - counts[name]))
    if abs(missing - units * size.unit) >= abs(missing):
        return 0
    counts[name] += units
    return units * size.unit


def share_of_count(count: int, size: LayerSize) -> float:
    """The share from which `int(share * size)` gives `count` for one of the layer's groups, and `count * unit` for the
    layer as a whole, so that it means the same to a pruner of either group.

    Examples:
        >>> 29 / 100, int(29 / 100 * 100), int(share_of_count(29, LayerSize(100)) * 100)
        (0.29, 28, 29)
    """
    share = count / size.group_size
    while int(share * size.group_size) < count or int(share * size.numel) < count * size.unit:
        share = math.nextafter(share, 1.0)
    return share


def uniform_sparsities(sizes: Mapping[str, LayerSize], sparsity: float) -> dict[str, float]:
    """The same share of zeros in every layer but for rounding, so that all together are exactly as sparse as asked."""
    return exact_budget(dict.fromkeys(sizes, sparsity), sizes, sparsity)


def owl_sparsities(
    outliers: Mapping[str, float], sizes: Mapping[str, LayerSize], sparsity: float, lam: float
) -> dict[str, float]:
    """Shares of zeros by the outliers of a layer: the equation at the top of this file, then [`exact_budget`].

    Args:
        outliers: by name of the layer, D_l of the block that it is in.
        sizes: of the same layers.
        sparsity: S, share of zeros in all layers together.
        lam: lambda, at least 0.
    """
    lowest, highest = min(outliers.values()), max(outliers.values())
    spread = max(highest - lowest, 1e-12)  # 0 where all blocks are alike: they get the same sparsity
    wanted = {name: -2 * lam * (ratio - lowest) / spread for name, ratio in outliers.items()}
    total = sum(size.numel for size in sizes.values())
    centre = sparsity - sum(wanted[name] * sizes[name].numel for name in wanted) / total
    return exact_budget({name: centre + value for name, value in wanted.items()}, sizes, sparsity)
