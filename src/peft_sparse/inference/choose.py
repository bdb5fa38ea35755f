"""Which way of computing a layer is the fastest, for each number of tokens: decided by timing them.

Layers that are alike are decided on together, on `SAMPLED_LAYERS` of them, the worst of which counts. A way is taken
only if it needs less than `MARGIN` of the time of the layer's own way, and less than `AGAIN` of it when both are timed
once more after everything else: on a machine that does other things one measurement proves little. What a way computes
is compared with the dense result before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from peft_sparse.inference.probe import example_input, measure_ratios
from peft_sparse.inference.report import TokenChoice
from peft_sparse.linears import Acceleration, Operand, PackedLinear, in_out_features, plain_class, weight_parameter

MARGIN = 0.9
AGAIN = 0.95
LOST = 1.5  # times the own way's time: no need to try with more tokens, to which zeros matter less
LOST_FROM = 8  # tokens; with fewer, other kernels take turns
SAMPLED_LAYERS = 3
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

    def __init__(self, linear: nn.Module, kinds: Sequence[type[Operand]], form: str, problems: list[str]) -> None:
        self.linear, self.problems = linear, problems
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

    def ways(self, tokens: int) -> dict[str, Way]:
        """Those that can be used for this many tokens, and compute what the dense layer computes."""
        in_features = in_out_features(self.linear)[0]
        x = example_input(tokens, in_features, self.weight.dtype, self.weight.device)
        expected = self.own["dense"](x)
        found = dict(self.own)
        for name, operand in self.operands.items():
            way = self._way(operand, tokens)
            if way is None or not operand.takes(x, self.bias):
                continue
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

    def _way(self, operand: Operand, tokens: int) -> Way | None:
        """As the layer will do it, the look at the weight included."""
        acceleration, linear, bias = Acceleration(self.packed, {tokens: operand}), self.packed, self.bias

        def way(x: torch.Tensor) -> torch.Tensor:
            chosen = acceleration.operand(linear, x)
            return (chosen or operand)(x, bias)

        return way


def choose_ways(
    linears: Sequence[nn.Module], kinds: Sequence[type[Operand]], form: str, tokens: Sequence[int]
) -> Decision:
    """Choose for layers that are alike.

    Args:
        linears: of the same class, shape, dtype and device, with about as many zeros.
        kinds: the operands that they can have.
        form: `"dense"` or `"packed"`: how they hold their weights, or will.
        tokens: how many are multiplied at a time; ascending.
    """
    problems: list[str] = []
    step = max(1, -(-len(linears) // SAMPLED_LAYERS))
    device = weight_parameter(linears[0]).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        layers = [_Layer(linear, kinds, form, problems) for linear in linears[::step]]
        choices: list[TokenChoice] = []
        lost = False
        for count in tokens:
            if lost:
                choices.append(TokenChoice(count, form, {}, None, "not timed: with fewer tokens already far slower"))
                continue
            measured = _measure(layers, count)
            choices.append(_choice(measured, form, count))
            others = [_worst(measured, name, form) for name in measured[0] if name not in ("dense", form)]
            lost = count >= LOST_FROM and all(ratio > LOST for ratio in others)
        choices = [_confirmed(choice, layers, form) for choice in choices]
    return Decision(choices, list(dict.fromkeys(problems)))


def _measure(layers: Sequence[_Layer], tokens: int, only: set[str] | None = None) -> list[dict[str, float]]:
    """For each layer, time relative to dense of the ways that all layers have."""
    ways = [layer.ways(tokens) for layer in layers]
    common = [name for name in ways[0] if all(name in own for own in ways) and (only is None or name in only)]
    found = []
    for layer, own in zip(layers, ways, strict=True):
        x = example_input(tokens, in_out_features(layer.linear)[0], layer.weight.dtype, layer.weight.device)
        runs = {name: partial(own[name], x) for name in common}
        found.append(measure_ratios(runs, "dense", layer.weight.device))
    return found


def _worst(measured: Sequence[dict[str, float]], name: str, form: str) -> float:
    """The largest ratio of a way to the own one."""
    return max(ratios[name] / ratios[form] for ratios in measured)


def _choice(measured: Sequence[dict[str, float]], form: str, tokens: int) -> TokenChoice:
    ratios = {name: max(found[name] for found in measured) for name in measured[0]}
    worst = {name: _worst(measured, name, form) for name in ratios if name not in ("dense", form)}
    if not worst:
        return TokenChoice(tokens, form, ratios, None, "nothing else can be used")
    best = min(worst, key=lambda name: worst[name])
    if worst[best] <= MARGIN:
        return TokenChoice(tokens, best, ratios, None, f"{best} takes {worst[best]:.2f} of the time of {form}")
    reason = f"{best} takes {worst[best]:.2f} of the time of {form}, and {MARGIN} or less is asked for"
    return TokenChoice(tokens, form, ratios, None, reason)


def _confirmed(choice: TokenChoice, layers: Sequence[_Layer], form: str) -> TokenChoice:
    """The choice, measured again; the own way if it does not hold."""
    if choice.chosen == form:
        return choice
    measured = _measure(layers, choice.tokens, {"dense", form, choice.chosen})
    again = _worst(measured, choice.chosen, form) if choice.chosen in measured[0] else float("inf")
    if again <= AGAIN:
        worse = {
            name: max(ratio, *(found.get(name, 0) for found in measured)) for name, ratio in choice.ratios.items()
        }
        return replace(choice, again=again, ratios=worse)
    return replace(choice, chosen=form, again=again, reason=f"{choice.reason}, but {again:.2f} when measured again")


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
