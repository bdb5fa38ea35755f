"""How sparse each layer gets: the same share everywhere, or a share for each layer by its full name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peft_sparse.sparsity import Pattern


def resolve_sparsities(
    targets: dict[str, nn.Module],
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None,
    default: float = 0.5,
) -> dict[str, float]:
    """The share of zeros of every target, by full name.

    Raises:
        ValueError: if a share does not suit the pattern, or if the names of a mapping are not those of the targets.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(targets, pattern.resolve_sparsity(sparsity, default))
    missing, unknown = [n for n in targets if n not in sparsity], [n for n in sparsity if n not in targets]
    if missing or unknown:
        raise ValueError(
            f"A mapping for `sparsity` has one share for each layer that is pruned, got none for {missing[:3]} and "
            f"{unknown[:3]}, which are not pruned; leave out or add those."
        )
    return {name: pattern.resolve_sparsity(sparsity[name], default) for name in targets}
