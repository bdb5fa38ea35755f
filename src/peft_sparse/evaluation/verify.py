"""Are all zeros still there? A model or a checkpoint, of whoever made it, compared with the one it came from.

Merging an adapter into a pruned model is where zeros get lost: a LoRA merge fills them, and nothing says so. Each
layer is read, compared and dropped before the next one, so that memory holds two weights at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from peft_sparse.evaluation.verify_report import MAX_INDICES, LayerCheck, VerifyReport
from peft_sparse.evaluation.weights import LinearWeights, linear_weights
from peft_sparse.sparsity import NM, Pattern, find_pattern, parse_pattern


def verify_sparsity(
    model_or_path: nn.Module | str | Path,
    reference: nn.Module | str | Path | LinearWeights | None = None,
    pattern: str | Pattern | None = None,
) -> VerifyReport:
    """Compare the zeros of a model's linear layers with those of the model it came from.

    Args:
        model_or_path: a model (with unmerged adapters, the weights that the forward uses), a folder with safetensors,
            dense or packed, or a repository on the Hub. Pickled weights are never opened.
        reference: the same, usually the pruned base model, or what was noted of it before it was merged into. None:
            nothing is lost or gained.
        pattern: an N:M pattern that every layer has to follow. None: each layer has to follow the pattern of the same
            layer in the reference, if it has one that is found: any N of an M of 2, 4, 8, 16 or 32. "unstructured":
            none.

    Returns:
        A [`VerifyReport`]; layers are in the model's order.

    Raises:
        ValueError: if either cannot be read, they have different layers, or one layer different shapes; or if the
            pattern is "unstructured" and there is no reference.

    Examples:
        >>> pruned, merged = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 2))
        >>> _ = pruned[0].weight.data.copy_(torch.tensor([[0.0, 0.0, 1.0, 2.0], [3.0, 0.0, 0.0, 4.0]]))
        >>> _ = merged[0].weight.data.copy_(torch.tensor([[0.0, 0.5, 1.0, 2.0], [3.0, 0.0, 0.0, 0.0]]))
        >>> report = verify_sparsity(merged, reference=pruned)
        >>> print(report)
        layer  shape  dtype    zeros  sparsity  pattern       lost  gained  violations
        0      2 x 4  float32      4    50.00%  unstructured     1       1           1
        total         float32      4    50.00%  unstructured     1       1           1
        0: zeros lost at (0, 1); groups against 2:4 at (0, 0)
        FAILED: 1 zeros lost, 1 groups against their pattern
        >>> report.exit_status
        1
    """
    expected = None if pattern is None else parse_pattern(pattern)
    if reference is None and expected is not None and not isinstance(expected, NM):
        raise ValueError(
            f"Without a reference `pattern` is N:M, such as '2:4', got {pattern!r}, which any zeros follow; pass the "
            "pruned model as `reference`."
        )
    checked = linear_weights(model_or_path)
    if reference is None:
        layers = [_check(name, checked.read(name), None, expected) for name in checked.names]
        return VerifyReport(layers, compared=False, notes=checked.notes)
    against = linear_weights(reference, checked.linears)
    if checked.linears is None and against.linears is not None:
        checked = linear_weights(model_or_path, against.linears)
    pairs = _pairs(checked, against)
    layers = [_check(name, checked.read(name), against.read(other), expected) for name, other in pairs]
    return VerifyReport(layers, compared=True, notes=sorted({*checked.notes, *against.notes}))


def _pairs(checked: LinearWeights, reference: LinearWeights) -> Iterator[tuple[str, str]]:
    """The layers of both, by name; names may differ by a prefix, as those of a model with and without its head do.

    Raises:
        ValueError: if one has layers that the other has not."""
    to_reference = _without_prefix(checked.names, reference.names)
    here, there = set(to_reference.values()), set(reference.names)
    # A side that does not tell which of its tensors are linears has others too.
    more_here = checked.linears is None and reference.linears is not None
    more_there = reference.linears is None and checked.linears is not None
    odd = sorted((set() if more_here else here - there) | (set() if more_there else there - here))
    if odd:
        where = "the reference" if odd[0] in here else "the model"
        raise ValueError(
            f"The model and its reference have the same layers, got `{odd[0]}` ({len(odd)} in all) missing from "
            f"{where}; pass the model that this one was made from."
        )
    return ((name, other) for name, other in to_reference.items() if other in there)


def _without_prefix(names: list[str], others: list[str]) -> dict[str, str]:
    present, first = set(others), names[0]
    for other in others:
        if other.endswith("." + first):
            mapped = {name: other.removesuffix(first) + name for name in names}
        elif first.endswith("." + other):
            mapped = {name: name.removeprefix(first.removesuffix(other)) for name in names}
        else:
            continue
        if set(mapped.values()) <= present and first not in present:
            return mapped
    return {name: name for name in names}


def _check(name: str, weight: torch.Tensor, reference: torch.Tensor | None, expected: Pattern | None) -> LayerCheck:
    zero = weight == 0
    lost, gained = zero.new_zeros(1, 1), zero.new_zeros(1, 1)
    if reference is not None:
        if reference.shape != weight.shape:
            raise ValueError(
                f"A layer has the same shape in the model and its reference, got {tuple(weight.shape)} and "
                f"{tuple(reference.shape)} for `{name}`; pass the model that this one was made from."
            )
        zero_before = (reference == 0).to(zero.device)
        lost, gained = zero_before & ~zero, zero & ~zero_before
        if expected is None:
            found = find_pattern(reference)
            expected = parse_pattern(found) if ":" in found else None
    against = _against(~zero, expected) if isinstance(expected, NM) else zero.new_zeros(1, 1)
    size = expected.m if isinstance(expected, NM) else 1
    out_features, in_features = weight.shape
    return LayerCheck(
        name=name,
        shape=(out_features, in_features),
        dtype=str(weight.dtype).removeprefix("torch."),
        zeros=int(zero.sum()),
        pattern=find_pattern(weight),
        expected=str(expected) if isinstance(expected, NM) else None,
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        violations=int(against.sum()),
        first_lost=_first(lost),
        first_violations=tuple((row, group * size) for row, group in _first(against)),
    )


def _against(kept: torch.Tensor, pattern: NM) -> torch.Tensor:
    """(out, groups) of a mask: whether a group keeps more than N. The last group of a row may be a short one."""
    padded = F.pad(kept, (0, -kept.shape[1] % pattern.m))
    return padded.view(len(kept), -1, pattern.m).sum(2) > pattern.n


def _first(where: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """(row, column) of the first few places that are set."""
    rows = where.any(1).nonzero().flatten()[:MAX_INDICES].tolist()
    places = [(row, column) for row in rows for column in where[row].nonzero().flatten()[:MAX_INDICES].tolist()]
    return tuple(places[:MAX_INDICES])
