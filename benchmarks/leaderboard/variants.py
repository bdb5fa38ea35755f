"""Rows that ask what would make SPP better at the same number of parameters; only run when `--rows` names them.

W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]), and the optimizer is Adam, whose steps have about the size of the rate
whatever the gradient's. A starts within 1 / sqrt(in) and B at zero, so at rate 2e-2 a few steps carry A far from its
start, and the first steps of B scale rows by random signs. The variants change one thing each:

* `spp_b4`, `spp_b16`, `spp_a4`: a higher rate for B, or for A (LoRA+ does so for LoRA's B);
* `spp_unit`: A starts normal with deviation 1, with the scaling divided by sqrt(in), so that rates are relative to it;
* `spp_ones`: A starts at 1, so that the first steps of B scale whole rows, in the direction of the gradient;
* `spp_gradient`: A starts in the direction in which the loss falls fastest, see [`_gradient_start`];
* `spp_additive`: W + M * (s B A), the update is not multiplied by the weight but by the mask, see [`AdditiveSpp`];
* `spp_s1`, `spp_s8`: another scaling, spp_alpha / r;
* `spp_swapped_s32`: a higher one than that of `spp_swapped_s8`, from the same start;
* `spp_swapped_still`: from that start, and B stays there, so that A alone is trained;
* `spp_r4`, `spp_r32`, `spp_r64`: fewer and more row groups, which is not the same number of parameters;
* `spp_swapped_taught`, `masked_lora_taught`: half of the loss is the divergence from a tuned dense model, see
  [`peft_sparse.distill`].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.leaderboard.methods import ROW_GROUPS, Method, masked_lora, spp, spp_swapped
from benchmarks.leaderboard.tuned import Tuned, parametrized
from peft_sparse.tuners.spp import SppLinear


def _with_ratio(ratio: float) -> Callable[[nn.Module], Tuned]:
    """B's rate is `ratio` times A's; the rate that is searched is their geometric mean."""

    def adapt(model: nn.Module) -> Tuned:
        found = spp(model)

        def groups(rates: Sequence[float]) -> list[dict[str, Any]]:
            named = dict(found.model.named_parameters())
            own = {factor: [p for name, p in named.items() if f".{factor}." in name] for factor in ("spp_A", "spp_B")}
            root = ratio**0.5
            return [
                {"params": own["spp_A"], "lr": rates[0] / root},
                {"params": own["spp_B"], "lr": rates[0] * root},
            ]

        return Tuned(found.model, found.merge, groups)

    return adapt


def _with_start(fill: Callable[[SppLinear, torch.Tensor], None]) -> Callable[[nn.Module], Tuned]:
    """A starts as `fill` makes it; B stays at zero, so the model still starts as it is."""

    def adapt(model: nn.Module) -> Tuned:
        found = spp(model)
        with torch.no_grad():
            for module in found.model.modules():
                if isinstance(module, SppLinear):
                    fill(module, module.spp_A["default"])
        return found

    return adapt


def _unit(layer: SppLinear, A: torch.Tensor) -> None:
    nn.init.normal_(A)
    layer._scaling["default"] /= layer.in_features**0.5


POWER_ITERATIONS, POWER_BATCHES, PROBE = 2, 2, 0.05


def _gradient_start(model: nn.Module) -> Tuned:
    """A[g] starts as the first right singular vector of the group's H = G * W, of the length that it has otherwise.

    A row of A is what B's gradient is a projection on, dB[i] = s <H[i], A[g]>, so a random one hides nearly all of it.
    The power iteration A <- H^T (H A) needs no H: the layer's own backward gives H A as dB, and with B set to a little
    of it H^T (H A) as dA. That takes two backward passes for each iteration and nothing of the weight's size.
    """
    found = spp(model)
    layers = [module for module in found.model.modules() if isinstance(module, SppLinear)]

    def backward(batches: Sequence[dict[str, torch.Tensor]]) -> None:
        found.model.zero_grad()
        for batch in batches:
            found.model(**batch).loss.backward()

    def prepare(batches: Sequence[dict[str, torch.Tensor]]) -> None:
        for _ in range(POWER_ITERATIONS):
            backward(batches[:POWER_BATCHES])
            with torch.no_grad():
                for layer in layers:
                    B = layer.spp_B["default"]
                    B.copy_(PROBE * B.grad / B.grad.abs().max().clamp_min(1e-30))
            backward(batches[:POWER_BATCHES])
            with torch.no_grad():
                for layer in layers:
                    A = layer.spp_A["default"]
                    norm = A.grad.norm(dim=1, keepdim=True)
                    A.copy_(torch.where(norm > 0, A.grad / norm.clamp_min(1e-30) / 3**0.5, A))
                    layer.spp_B["default"].zero_()
        found.model.zero_grad()

    return Tuned(found.model, found.merge, prepare=prepare)


class AdditiveSpp(nn.Module):
    """W -> W + M * (s B[i] A[g(i), j]), M = (W != 0), s = 2 rms(W[M]): SPP's factors, groups, start and number of
    parameters, with the mask where SPP has the weight, so that a small weight moves as far as a large one. It could be
    computed as SPP is, with H = G * M; here it is a parametrization, which only has to be right.
    """

    def __init__(self, weight: torch.Tensor, r: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        groups = min(r, rows)
        self.A, self.B = nn.Parameter(torch.empty(groups, columns)), nn.Parameter(torch.zeros(rows))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        parts = torch.arange(rows).tensor_split(groups)
        of_row = torch.cat([torch.full((len(part),), group) for group, part in enumerate(parts)])
        self.register_buffer("of_row", of_row)
        self.scaling = 2 * float(weight.detach()[weight != 0].square().mean().sqrt())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (weight != 0) * (self.scaling * self.B[:, None] * self.A[self.of_row])


def _additive(model: nn.Module) -> Tuned:
    return parametrized(model, lambda weight: AdditiveSpp(weight, ROW_GROUPS))


def _scaled(scaling: float) -> Callable[[nn.Module], Tuned]:
    return lambda model: spp(model, scaling=scaling)


def _still(model: nn.Module) -> Tuned:
    found = spp_swapped(model)
    for name, parameter in found.model.named_parameters():
        if ".spp_B." in name:
            parameter.requires_grad_(False)
    return found


def _groups(r: int) -> Callable[[nn.Module], Tuned]:
    return lambda model: spp(model, r=r)


VARIANTS: dict[str, Method] = {
    "spp_b4": Method("SPP, rate of B 4 times A's", _with_ratio(4), (2e-2,)),
    "spp_b16": Method("SPP, rate of B 16 times A's", _with_ratio(16), (2e-2,)),
    "spp_a4": Method("SPP, rate of A 4 times B's", _with_ratio(1 / 4), (2e-2,)),
    "spp_unit": Method("SPP, A normal and scaling / sqrt(in)", _with_start(_unit), (1e-1,)),
    "spp_ones": Method("SPP, A = 1 at the start", _with_start(lambda layer, A: A.fill_(1.0)), (1e-2,)),
    "spp_gradient": Method("SPP, A along the gradient at the start", _gradient_start, (2e-2,)),
    "spp_additive": Method("SPP's factors times the mask, not the weight", _additive, (6e-2,)),
    "spp_s1": Method("SPP, scaling 1", _scaled(1.0), (2e-2,)),
    "spp_s8": Method("SPP, scaling 8", _scaled(8.0), (1e-2,)),
    "spp_swapped_s32": Method("SPP, A = 0 and B = 1, scaling 32", lambda m: spp_swapped(m, 32.0), (1.25e-3,)),
    "spp_swapped_still": Method("SPP, A = 0 and B = 1, B not trained", _still, (2e-2,)),
    "spp_r4": Method("SPP r=4", _groups(4), (2e-2,)),
    "spp_r32": Method("SPP r=32", _groups(2 * ROW_GROUPS), (2e-2,)),
    "spp_r64": Method("SPP r=64", _groups(4 * ROW_GROUPS), (2e-2,)),
    "spp_swapped_taught": Method("SPP, A = 0 and B = 1, with a teacher", spp_swapped, (2e-2,), taught=True),
    "masked_lora_taught": Method("masked LoRA r=8, with a teacher", masked_lora, (5e-3,), taught=True),
}
