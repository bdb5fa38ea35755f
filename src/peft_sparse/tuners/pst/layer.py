"""PST's layer: Y = X (M * W')^T with W' = W + beta U V and M selected from S = |W'| + alpha1 A B + alpha2 (R + C)
(arXiv 2205.11005).

The mask is a function of the factors and of one number, how many weights are pruned in each comparison group. That
number is a persistent buffer, so a reloaded or resumed model has exactly the same mask. It is a count, and an integer,
since a share would be rounded when a model is cast to half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_sparse import ops
from peft_sparse.linears import is_dtensor, unwrap, weight_parameter
from peft_sparse.sparsity import Pattern, parse_pattern, sparsity_at, unpack_mask
from peft_sparse.tuners.merging import check_not_merged
from peft_sparse.tuners.pst.config import UNIT, PstConfig
from peft_sparse.tuners.pst.counts import PrunedCounts
from peft_sparse.tuners.sparse_layer import SparseLayer

FACTORS = ops.PstFactors._fields


@dataclass(frozen=True)
class _Settings:
    """What a layer needs of an adapter's config, as plain values."""

    pattern: Pattern
    group_size: int
    schedule: Callable[[int, int], float]  # (step, total steps) -> sparsity
    sparsity: float
    total_steps: int | None
    scales: ops.PstScales


class PstLinear(SparseLayer):
    """A linear that is pruned while it is tuned.

    Attributes:
        pst_U, pst_V: (out, r) and (r, in), the low-rank weight update.
        pst_D: (out, in), the full weight update.
        pst_A, pst_B, pst_R, pst_C: (out, score_r), (score_r, in), (out,), (in,), PST's scores.
        pst_S: (out, in), movement scores.
        pst_pruned: int64 scalar, weights pruned in each comparison group (the layer; for N:M each M).

    An adapter has those that its `importance` and `weight_update` call for.
    """

    adapter_layer_names = tuple(f"pst_{factor}" for factor in FACTORS)
    other_param_names = ("pst_pruned",)
    dicts_by_adapter = (*SparseLayer.dicts_by_adapter, "_settings", "_masks", "_driven")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict({}))
        self.pst_pruned = PrunedCounts()
        self._settings: dict[str, _Settings] = {}
        self._masks: dict[str, ops.MaskCache] = {}
        self._driven: dict[str, bool] = {}  # whether a schedule was set in this process; for warnings only

    def update_layer(self, adapter_name: str, config: PstConfig, **kwargs: Any) -> None:
        """Add an adapter. U and A start normal, all else at zero, as the authors' do, unless the config says
        otherwise: W' = W and S = |W'|."""
        for attribute, start in zip(self.adapter_layer_names, self._initial_factors(config), strict=True):
            if start is not None:
                getattr(self, attribute)[adapter_name] = nn.Parameter(start)
        pattern, sparsity = parse_pattern(config.pattern), config.sparsity_of(self.module_name)
        schedule = partial(
            _sparsity_of_step,
            schedule=config.schedule,
            initial_sparsity=config.initial_sparsity,
            final_sparsity=sparsity,
            initial_warmup=config.initial_warmup,
            final_warmup=config.final_warmup,
        )
        self._settings[adapter_name] = _Settings(
            pattern=pattern,
            group_size=pattern.group_size((self.out_features, self.in_features)),
            schedule=schedule,
            sparsity=sparsity,
            total_steps=config.total_steps,
            scales=ops.PstScales(config.beta, config.alpha1, config.alpha2),
        )
        self._masks[adapter_name] = ops.MaskCache()
        count = self._count(adapter_name, schedule(0, 1))  # a number, wherever new tensors are made
        self.pst_pruned[adapter_name] = torch.tensor(count, dtype=torch.int64, device=torch.device("cpu"))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_factors(self, config: PstConfig) -> ops.PstFactors:
        rows, columns, factors = self.out_features, self.in_features, ops.PstFactors()
        zeros = torch.zeros if config.init_weights else torch.randn
        if config.weight_update == "low_rank":
            U = torch.randn(rows, config.r)
            if config.init_weights == UNIT:
                U /= rows**0.5
            factors = factors._replace(U=U, V=zeros(config.r, columns))
        elif config.weight_update == "full":
            factors = factors._replace(D=zeros(rows, columns))
        if config.importance == "pst":
            A, B = torch.randn(rows, config.score_r), zeros(config.score_r, columns)
            factors = factors._replace(A=A, B=B, R=zeros(rows), C=zeros(columns))
        elif config.importance == "movement":
            factors = factors._replace(S=zeros(rows, columns))
        return factors

    def prunes_untrained(self, adapter_name: str) -> bool:
        """Whether the adapter prunes while all that starts at zero is still there."""
        from_zero = [getattr(self, name) for name in self.adapter_layer_names if name not in ("pst_U", "pst_A")]
        factors = [tensors[adapter_name] for tensors in from_zero if adapter_name in tensors]
        return bool(factors) and int(self.pst_pruned[adapter_name]) > 0 and not any(bool(f.any()) for f in factors)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = weight_parameter(unwrap(self.base_layer))
        self.pst_pruned.withheld = is_dtensor(weight) and weight.is_meta

    # The schedule

    def set_sparsity_step(self, adapter_name: str, step: int, total_steps: int) -> None:
        """Prune as many weights as the adapter's schedule says after `step` of `total_steps` optimizer steps.

        Raises:
            ValueError: if the adapter is merged, so that the base weight has the zeros of another step.
        """
        check_not_merged(self, adapter_name, "A sparsity schedule drives")
        sparsity = self._settings[adapter_name].schedule(step, total_steps)
        self.pst_pruned[adapter_name].fill_(self._count(adapter_name, sparsity))
        self._masks[adapter_name].mark_stale()
        self._driven[adapter_name] = True

    def is_trainable(self, adapter_name: str) -> bool:
        """Whether a factor of the adapter is trained."""
        return any(factor is not None and factor.requires_grad for factor in self.factors(adapter_name))

    def is_driven(self, adapter_name: str) -> bool:
        """Whether `set_sparsity_step` was called for the adapter in this process."""
        return adapter_name in self._driven

    def group_size(self, adapter_name: str) -> int:
        """Weights that compete with each other: all of the layer for unstructured, M for N:M."""
        return self._settings[adapter_name].group_size

    def num_groups(self, adapter_name: str) -> int:
        """Number of comparison groups: 1 for unstructured, one per M weights for N:M."""
        return self.in_features * self.out_features // self.group_size(adapter_name)

    def _count(self, adapter_name: str, sparsity: float) -> int:
        settings = self._settings[adapter_name]
        return settings.pattern.num_pruned(sparsity, settings.group_size)

    def total_steps(self, adapter_name: str) -> int | None:
        """`PstConfig.total_steps`."""
        return self._settings[adapter_name].total_steps

    def sparsity_progress(self, adapter_name: str) -> tuple[int, int, int]:
        """Weights pruned in each comparison group: at the start of the schedule, now, and at its end."""
        settings = self._settings[adapter_name]
        start, end = self._count(adapter_name, settings.schedule(0, 1)), self._count(adapter_name, settings.sparsity)
        return start, int(self.pst_pruned[adapter_name]), end

    # The function

    def factors(self, adapter_name: str) -> ops.PstFactors:
        """The adapter's trained tensors; None for those that its config does not call for."""
        return ops.PstFactors(*(getattr(self, name).get(adapter_name) for name in self.adapter_layer_names))

    def _packed_mask(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        settings = self._settings[adapter_name]
        return ops.pst_mask(
            self._masks[adapter_name],
            weight,
            self.pst_pruned[adapter_name],
            settings.group_size,
            self.factors(adapter_name),
            settings.scales,
        )

    def get_mask(self, adapter_name: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """M, bool (out, in), True = kept.

        Args:
            weight: W, (out, in); None: the base weight as it is now.
        """
        with self.weights_loaded():
            return self._mask(adapter_name, self.base_weight if weight is None else weight)

    def _mask(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        return unpack_mask(self._packed_mask(adapter_name, weight), self.in_features)

    def get_scores(self, adapter_name: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """S, (out, in) in at least float32: what the mask was selected from.

        Args:
            weight: W, (out, in); None: the base weight as it is now.
        """
        with self.weights_loaded():
            factors, scales = self.factors(adapter_name), self._settings[adapter_name].scales
            weight = self.base_weight if weight is None else weight
            updated = ops.reference.pst_updated_weight(weight, factors, scales)
            return ops.reference.pst_scores(updated, factors, scales)

    def effective_weight(self, adapter_name: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.base_weight if weight is None else weight
        mask, scales = self._mask(adapter_name, weight), self._settings[adapter_name].scales
        # A masked negative weight is -0.0, and -0.0 + 0.0 is 0.0: a merged weight is packed bit for bit.
        return ops.reference.pst_weight(weight, mask, self.factors(adapter_name), scales) + 0.0

    def adapted_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter_name: str
    ) -> torch.Tensor:
        mask, scales = self._packed_mask(adapter_name, weight), self._settings[adapter_name].scales
        return ops.pst_linear(x, weight, bias, mask, self.factors(adapter_name), scales)

    def support(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        scales = self._settings[adapter_name].scales
        updated = ops.reference.pst_updated_weight(weight, self.factors(adapter_name), scales)
        return self._mask(adapter_name, weight) & (updated != 0)


def _sparsity_of_step(step: int, total_steps: int, **settings: Any) -> float:
    return sparsity_at(step=step, total_steps=total_steps, **settings)
