"""Which way of computing a layer is the fastest, for each number of tokens: decided by timing them.

Layers that are alike are decided on together. A way is taken only if it needs less than `MARGIN` of the time of the
layer's own way, and less than `AGAIN` of it when both are timed once more after everything else: on a machine that
does other things one measurement proves little. For numbers of tokens that were not timed it is taken only where it
was far ahead for the next smaller and the next larger one: kernels like some numbers better than others, by up to a
half. What a way computes is compared with the dense result before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from peft_sparse.inference.probe import Run, example_input, measure_ratios
from peft_sparse.inference.report import TokenChoice
from peft_sparse.linears import Acceleration, Operand, PackedLinear, in_out_features, plain_class, weight_parameter

MARGIN = 0.85
AGAIN = 0.9
BETWEEN = 0.6
LOST = 1.5  # times the own way's time: no need to try with more tokens, to which zeros matter less
LOST_FROM = 8  # tokens; with fewer, other kernels take turns
SAMPLED_BYTES = 1 << 28  # of dense weights that are gone through to time them: more than caches hold
SAMPLED_WORK = 1 << 32  # multiplications: with many tokens fewer layers will do, as memory matters less
# of the norm of the dense result
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}

Way = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Decision:
    """What was chosen for layers that are alike.

    Attributes:
        choices: for each number of tokens.
        problems: why some ways could not be used, in words.
    """

    choices: list[TokenChoice]
    problems: list[str] = field(default_factory=list)


class _Layer:
    """One of the layers that are timed, and the ways to compute it."""

    def __init__(
        self, linear: nn.Module, kinds: Sequence[type[Operand]], form: str, problems: list[str], place: int
    ) -> None:
        self.linear, self.problems, self.place = linear, problems, place
        self.weight: torch.Tensor = weight_parameter(linear)
        self.bias = cast("torch.Tensor | None", linear.bias)
        plain = plain_class(linear)
        self.own: dict[str, Way] = {}
        packed = linear
        if isinstance(linear, PackedLinear):
            weight = linear.dense_weight()
            self.own["dense"] = lambda x: F.linear(x, weight, linear.bias)
        else:
            self.own["dense"] = lambda x: plain.forward(linear, x)
            packed = PackedLinear.from_linear(linear) if form == "packed" else linear
        if isinstance(packed, PackedLinear):
            self.own["packed"] = lambda x: PackedLinear.forward(packed, x)
        self.operands: dict[str, Operand] = {}
        for kind in kinds:
            try:
                self.operands[kind.name] = kind.of(packed)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                problems.append(f"{kind.name} cannot be made here ({type(error).__name__}: {_first_line(error)})")
        self.packed = packed

    def ways(self, x: torch.Tensor, wanted: set[str]) -> dict[str, Way]:
        """Those of the wanted ones that can be used for an input, and compute what the dense layer computes."""
        expected = self.own["dense"](x)
        found = {name: way for name, way in self.own.items() if name in wanted}
        for name, operand in self.operands.items():
            if name not in wanted or not operand.takes(x, self.bias):
                continue
            way = self._way(operand, x.numel() // x.shape[-1])
            try:
                error = float((way(x) - expected).norm() / expected.norm().clamp_min(1e-30))
            except (RuntimeError, NotImplementedError) as raised:
                self.problems.append(f"{name} fails here ({type(raised).__name__}: {_first_line(raised)})")
                continue
            if error <= TOLERANCE[self.weight.dtype]:
                found[name] = way
            else:
                self.problems.append(f"{name} differs from the dense result by {error:.1e} of its norm")
        return found

    def _way(self, operand: Operand, tokens: int) -> Way:
        """As the layer will do it, the look at the weight included."""
        acceleration, linear, bias = Acceleration(self.packed, {tokens: operand}), self.packed, self.bias

        def way(x: torch.Tensor) -> torch.Tensor:
            chosen = acceleration.operand(linear, x)
            return (chosen or operand)(x, bias)

        return way


@dataclass
class Group:
    """Layers that are alike, and are decided on together.

    Attributes:
        linears: of the same class, shape, dtype and device, with about as many zeros.
        kinds: the operands that they can have.
        form: `"dense"` or `"packed"`: how they hold their weights, or will.
        places: where each of them is among the model's linears.
    """

    linears: list[nn.Module]
    kinds: tuple[type[Operand], ...]
    form: str
    places: list[int]


def choose_ways(groups: Sequence[Group], tokens: Sequence[int]) -> list[Decision]:
    """Choose for all groups of one device.

    Args:
        tokens: how many are multiplied at a time; ascending.
    """
    device = weight_parameter(groups[0].linears[0]).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        layers = _sample(groups)
        decisions = [Decision([], layers[index][0].problems) for index in range(len(groups))]
        left = [{kind.name for kind in group.kinds} for group in groups]  # ways that have not lost
        for count in tokens:
            _choose_for(count, groups, layers, decisions, left)
        for number, count in enumerate(tokens):
            _confirm(number, count, groups, layers, decisions)
    for decision in decisions:
        decision.problems = list(dict.fromkeys(decision.problems))
    return decisions


def _choose_for(
    count: int,
    groups: Sequence[Group],
    layers: dict[int, list[_Layer]],
    decisions: Sequence[Decision],
    left: list[set[str]],
) -> None:
    """Add each group's choice for a number of tokens, and take the ways out of `left` that are not to be tried with
    more."""
    wanted = {index: {"dense", group.form} | left[index] for index, group in enumerate(groups) if left[index]}
    measured = _measure({index: layers[index] for index in wanted}, count, wanted)
    for index, group in enumerate(groups):
        choice = _choice(measured.get(index), group.form, count)
        decisions[index].choices.append(choice)
        if count >= LOST_FROM:
            limit = LOST * choice.ratios.get(group.form, 1.0)
            left[index] = {name for name in left[index] if choice.ratios.get(name, 0.0) <= limit}


def _confirm(
    number: int, count: int, groups: Sequence[Group], layers: dict[int, list[_Layer]], decisions: Sequence[Decision]
) -> None:
    """Measure each group's choice for a number of tokens, its `number`th one, again; its own way if it does not
    hold."""
    chosen = [decision.choices[number].chosen for decision in decisions]
    taken = {index: own for index, own in layers.items() if chosen[index] != groups[index].form}
    if not taken:
        return
    wanted = {index: {"dense", groups[index].form, chosen[index]} for index in taken}
    for index, ratios in _measure(taken, count, wanted).items():
        choices = decisions[index].choices
        choices[number] = _confirmed(choices[number], ratios, groups[index].form)


def _sample(groups: Sequence[Group]) -> dict[int, list[_Layer]]:
    """The layers that are timed, by the number of their group: as many of each as together do not fit into a cache."""
    sizes = [weight_parameter(group.linears[0]).element_size() * _numel(group.linears[0]) for group in groups]
    most = max(1, -(-SAMPLED_BYTES // max(1, sum(sizes))))
    found: dict[int, list[_Layer]] = {}
    for index, group in enumerate(groups):
        problems: list[str] = []
        step = max(1, -(-len(group.linears) // most))
        found[index] = [
            _Layer(linear, group.kinds, group.form, problems, place)
            for linear, place in list(zip(group.linears, group.places, strict=True))[::step]
        ]
    return found


def _measure(layers: dict[int, list[_Layer]], tokens: int, wanted: dict[int, set[str]]) -> dict[int, dict[str, float]]:
    """By the number of the group, time relative to dense of the wanted ways that all of its layers have."""
    runs: list[tuple[int, int, dict[str, Run]]] = []
    work = tokens * sum(_numel(layer.linear) for own in layers.values() for layer in own)
    for index, all_own in layers.items():
        own = all_own[:: -(-work // SAMPLED_WORK)]
        x = example_input(tokens, in_out_features(own[0].linear)[0], own[0].weight.dtype, own[0].weight.device)
        ways = [layer.ways(x, wanted[index]) for layer in own]
        names = [name for name in ways[0] if all(name in found for found in ways)]
        for layer, found in zip(own, ways, strict=True):
            runs.append((layer.place, index, {name: partial(found[name], x) for name in names}))
    if not runs:
        return {}
    in_order = [(index, own) for _, index, own in sorted(runs, key=lambda run: run[0])]
    return measure_ratios(in_order, "dense", next(iter(layers.values()))[0].weight.device)


def _choice(ratios: dict[str, float] | None, form: str, tokens: int) -> TokenChoice:
    if ratios is None:
        return TokenChoice(tokens, form, {}, None, "not timed: with fewer tokens already far slower")
    others = {name: ratio / ratios[form] for name, ratio in ratios.items() if name not in ("dense", form)}
    if not others:
        return TokenChoice(tokens, form, ratios, None, "nothing else can be used")
    best = min(others, key=lambda name: others[name])
    if others[best] <= MARGIN:
        return TokenChoice(tokens, best, ratios, None, f"{best} takes {others[best]:.2f} of the time of {form}")
    reason = f"{best} takes {others[best]:.2f} of the time of {form}, and {MARGIN} or less is asked for"
    return TokenChoice(tokens, form, ratios, None, reason)


def _confirmed(choice: TokenChoice, ratios: dict[str, float], form: str) -> TokenChoice:
    """The choice after it was measured again; the own way if it does not hold."""
    again = ratios[choice.chosen] / ratios[form] if choice.chosen in ratios else float("inf")
    if again <= AGAIN:
        worse = {name: max(ratio, ratios.get(name, 0.0)) for name, ratio in choice.ratios.items()}
        return replace(choice, again=again, ratios=worse)
    return replace(choice, chosen=form, again=again, reason=f"{choice.reason}, but {again:.2f} when measured again")


def clear_counts(choices: Sequence[TokenChoice], form: str) -> set[int]:
    """The numbers of tokens whose choice is so far ahead that it holds up to the next such number."""
    return {
        choice.tokens
        for choice in choices
        if max(choice.ratios.get(choice.chosen, 0.0) / choice.ratios.get(form, 1.0), choice.again or 0.0) <= BETWEEN
    }


def _numel(linear: nn.Module) -> int:
    in_features, out_features = in_out_features(linear)
    return in_features * out_features


def slower_than_dense(choices: Sequence[TokenChoice]) -> str | None:
    """Why a layer that gives up its dense weight for these choices would lose by it; None if it would not."""
    for choice in choices:
        ratio = choice.ratios.get(choice.chosen)
        if ratio is None or ratio > AGAIN:
            took = "was not timed" if ratio is None else f"takes {ratio:.2f} of the dense time"
            return f"kept dense: at a token count of {choice.tokens} {choice.chosen} {took}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
