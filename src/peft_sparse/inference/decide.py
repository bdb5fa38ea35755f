"""What is to be done with each linear of a model: which of them are tried at all, which of those are alike and decided
on together, and what was chosen for them (choose.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from peft_sparse.inference.choose import Decision, Group, choose_ways, slower_than_dense
from peft_sparse.inference.report import TokenChoice
from peft_sparse.linears import (
    OPERANDS,
    Operand,
    PackedLinear,
    in_out_features,
    num_zeros,
    plain_class,
    refuses_acceleration,
    weight_parameter,
)

MIN_SPARSITY = 0.3  # below, nothing was faster anywhere that we measured
MIN_NUMEL = 1 << 16  # in smaller layers, the time to decide is as much as there is to gain


def decide(
    linears: Sequence[nn.Module], to_pack: Collection[int] | None, counts: tuple[int, ...], kernel: str | None
) -> dict[int, Decision]:
    """By the id of each linear. One without choices stays as it is, and so does one that would be slower packed.

    Args:
        to_pack: ids of the dense linears that may give up their weights; None: all keep them.
        counts: of tokens, ascending.
        kernel: as in [`accelerate_sparse`].
    """
    found: dict[int, Decision] = {}
    groups: dict[tuple[Any, ...], Group] = {}
    for place, linear in enumerate(linears):
        kinds, problems = _possible(linear, to_pack, kernel)
        if not kinds:
            found[id(linear)] = Decision([], problems)
            continue
        packed = isinstance(linear, PackedLinear) or id(linear) in (to_pack or ())
        form = "packed" if packed else "dense"
        group = groups.setdefault(_likeness(linear, form, kinds), Group([], kinds, form, []))
        group.linears.append(linear)
        group.places.append(place)
    for group, decision in _decided(list(groups.values()), counts, kernel):
        gives_up = kernel is None and id(group.linears[0]) in (to_pack or ())
        slower = slower_than_dense(decision.choices) if gives_up else None
        if slower is not None:
            decision = Decision([], [slower])
        found.update((id(linear), decision) for linear in group.linears)
    return found


def _possible(
    linear: nn.Module, to_pack: Collection[int] | None, kernel: str | None
) -> tuple[tuple[type[Operand], ...], list[str]]:
    """The operands that a linear can have, and why it has no others."""
    refused = refuses_acceleration(linear) or (_too_little(linear) if kernel is None else None)
    if refused is None and to_pack is not None and not isinstance(linear, PackedLinear) and id(linear) not in to_pack:
        refused = "kept dense: its weight is shared, hooks are attached, or it is the whole model"
    if refused is not None:
        return (), [refused]
    refusals = {kind: kind.refusal(linear) for kind in OPERANDS.values() if kernel in (None, kind.name)}
    kinds = tuple(kind for kind, reason in refusals.items() if reason is None)
    device = weight_parameter(linear).device.type
    relevant = [reason for kind, reason in refusals.items() if reason and (device in kind.device_types or kernel)]
    return kinds, relevant or [f"there is nothing for {device}"]


def _likeness(linear: nn.Module, form: str, kinds: tuple[type[Operand], ...]) -> tuple[Any, ...]:
    """What linears have in common that are decided on together."""
    weight, (in_features, out_features) = weight_parameter(linear), in_out_features(linear)
    share = round(num_zeros(linear) / (in_features * out_features), 2)
    shape = (out_features, in_features)
    return (weight.device, plain_class(linear), form, linear.bias is None, shape, weight.dtype, share, kinds)


def _decided(groups: Sequence[Group], counts: tuple[int, ...], kernel: str | None) -> Iterator[tuple[Group, Decision]]:
    """Each group with what is to be done with it; those of one device are timed together."""
    if kernel is not None:
        for group in groups:
            yield group, Decision([TokenChoice(count, kernel, {}, None, "as `kernel` says") for count in counts])
        return
    devices = {weight_parameter(group.linears[0]).device for group in groups}
    for device in sorted(devices, key=str):
        together = [group for group in groups if weight_parameter(group.linears[0]).device == device]
        yield from zip(together, choose_ways(together, counts), strict=True)


def _too_little(linear: nn.Module) -> str | None:
    """Why there is nothing to gain in a layer; None if there may be."""
    in_features, out_features = in_out_features(linear)
    if in_features * out_features < MIN_NUMEL:
        return f"nothing is tried below {MIN_NUMEL:,} weights"
    if num_zeros(linear) < MIN_SPARSITY * in_features * out_features:
        return f"nothing is tried below {MIN_SPARSITY:.0%} zeros"
    return None
