"""A model that is ready to be trained, and how it becomes a plain one again.

`Tuned` is what all rows look like to the training loop. Two of them have no PEFT method: masked LoRA, whose update is
multiplied by the mask in every forward (W + M * s B A, the idea of PERP's MaskLoRA and SQFT's SparsePEFT, written from
the formula), and full sparse fine-tuning, in which the weights themselves are trained and the pruned ones get no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from peft_sparse.linears import block_linears, weight_parameter
from peft_sparse.training import pst_param_groups


@dataclass
class Tuned:
    """A row's model.

    Attributes:
        model: trains.
        merge: returns the plain model that the row leaves; called once, after training.
        groups: from the rates to the optimizer's parameter groups.
        after_step: called with (optimizer steps done, steps in all), once before the first step.
        prepare: called with the training batches before the optimizer is made.
    """

    model: nn.Module
    merge: Callable[[], nn.Module]
    groups: Callable[[Sequence[float]], list[dict[str, Any]]] | None = None
    after_step: Callable[[int, int], None] = field(default=lambda done, total: None)
    prepare: Callable[[Sequence[dict[str, torch.Tensor]]], None] = field(default=lambda batches: None)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def parameter_groups(self, rates: Sequence[float]) -> list[dict[str, Any]]:
        """For an optimizer."""
        if self.groups is not None:
            return self.groups(rates)
        return [{"params": self.trainable, "lr": rates[0]}]


def head_parameters(model: nn.Module, heads: Iterable[str]) -> list[nn.Parameter]:
    """Parameters of the modules with these last names: a classifier that starts at random is trained in every row."""
    names = set(heads)
    return [
        parameter
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in names
        for parameter in module.parameters()
    ]


def with_head_rate(found: Tuned, heads: Iterable[str], rate: float) -> Tuned:
    """The same, but the heads learn at a rate of their own, whatever the others' is."""
    own = {id(parameter) for parameter in head_parameters(found.model, heads)}

    def groups(rates: Sequence[float]) -> list[dict[str, Any]]:
        head = [parameter for parameter in found.trainable if id(parameter) in own]
        rest = [
            {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in own]}
            for group in found.parameter_groups(rates)
        ]
        return [*(group for group in rest if group["params"]), {"params": head, "lr": rate}]

    return replace(found, groups=groups)


def full(model: nn.Module, masked: bool, heads: Sequence[str] = ()) -> Tuned:
    """The weights of the blocks' linears are trained; nothing else is but the heads.

    Args:
        masked: zeros get no gradient. AdamW without weight decay then never moves them, as their moments stay zero.
    """
    model.requires_grad_(False)
    for parameter in head_parameters(model, heads):
        parameter.requires_grad_(True)
    for linear in block_linears(model).values():
        weight = weight_parameter(linear).requires_grad_(True)
        if masked:
            weight.register_hook(_Masked(weight.detach() != 0))
    return Tuned(model, lambda: model)


class _Masked:
    """The gradient of a masked weight."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.mask


class MaskedLora(nn.Module):
    """W -> W + M * (s B A), M = (W != 0), on a weight as it is stored: (rows, columns).

    Attributes:
        A: (r, columns), kaiming-uniform. B: (rows, r), zero: identity at the start, as PEFT's LoRA.
    """

    def __init__(self, weight: torch.Tensor, r: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.empty(r, columns, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(rows, r, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = alpha / r

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (weight != 0) * (self.scaling * (self.B @ self.A))


def masked_lora(model: nn.Module, r: int, alpha: float) -> Tuned:
    """Masked LoRA on every linear of the blocks."""
    return parametrized(model, lambda weight: MaskedLora(weight, r, alpha))


def parametrized(model: nn.Module, make: Callable[[torch.Tensor], nn.Module]) -> Tuned:
    """A parametrization of the weight of every linear of the blocks is trained, and nothing else."""
    model.requires_grad_(False)
    linears = list(block_linears(model).values())
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", make(linear.weight))

    def merge() -> nn.Module:
        for linear in linears:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        return model

    return Tuned(model, merge)


def peft_tuned(model: nn.Module, after_merge: Callable[[nn.Module], None] = lambda merged: None) -> Tuned:
    """A model with an adapter of PEFT's or ours.

    Args:
        after_merge: what else is done to the merged model, in place.
    """

    def merge() -> nn.Module:
        merged = model.merge_and_unload()
        after_merge(merged)
        return merged

    return Tuned(model, merge)


def pst_tuned(model: nn.Module, frozen: Sequence[str] = ()) -> Tuned:
    """A model with a PST adapter: two rates, of the weights and of the scores, and a schedule.

    Args:
        frozen: factors that an ablation leaves out, such as ("pst_A", "pst_B").
    """
    for name, parameter in model.named_parameters():
        if any(factor in name.split(".") for factor in frozen):
            parameter.requires_grad_(False)

    def groups(rates: Sequence[float]) -> list[dict[str, Any]]:
        return pst_param_groups(model, lr=rates[0], score_lr=rates[-1])

    return Tuned(model, model.merge_and_unload, groups, model.base_model.set_sparsity_step)
