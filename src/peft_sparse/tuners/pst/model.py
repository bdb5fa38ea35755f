"""PST's model: places [`PstLinear`] layers and drives their schedule."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_sparse.linears import PackedLinear, bits, in_out_features, unwrap, warn_of_dense_parameters
from peft_sparse.sparsity import parse_pattern, sparsities_by_name
from peft_sparse.tuners.merging import check_not_merged
from peft_sparse.tuners.pst.config import PstConfig
from peft_sparse.tuners.pst.layer import PstLinear
from peft_sparse.tuners.sparse_model import SparseTuner

# Small layers may have factors larger than they are, as tests of tiny models do; beyond this it is a slip.
MAX_RANK = 1024
WAY_OUT = (
    "add `peft_sparse.SparsityCallback()` to the Trainer's `callbacks`, or call "
    "`model.base_model.set_sparsity_step(step, total_steps)` after every optimizer step"
)


def set_sparsity_step(model: nn.Module, step: int, total_steps: int | None = None) -> None:
    """Set every PST layer of a model to its sparsity after `step` optimizer steps; used by the next forward.

    Active adapters are driven; of several active ones in the model, those that are trainable.

    Args:
        model: any module that holds PST layers: a PeftModel, a PstModel, or a transformers model with `add_adapter`.
        step: optimizer steps done, from 0.
        total_steps: steps that the schedule spans; None: `PstConfig.total_steps`.

    Raises:
        ValueError: if the model has no PST layer, for a step that is none, if no total is known, or if an adapter is
            merged. Nothing is set then.
    """
    driven = driven_adapters(model)
    for name, value in (("step", step), ("total_steps", total_steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 0):
            raise ValueError(f"`{name}` counts optimizer steps, in whole numbers from 0, got {value!r}.")
    totals = [layer.total_steps(name) or 0 if total_steps is None else total_steps for layer, name in driven]
    if min(totals) <= 0:
        raise ValueError(
            f"The schedule spans `total_steps` > 0 optimizer steps, got {total_steps}; pass it, or set "
            "`PstConfig(total_steps=...)`."
        )
    for layer, adapter_name in driven:
        check_not_merged(layer, adapter_name, "A sparsity schedule drives")
    for (layer, adapter_name), total in zip(driven, totals, strict=True):
        layer.set_sparsity_step(adapter_name, step, total)


def driven_adapters(model: nn.Module) -> list[tuple[PstLinear, str]]:
    """The PST layers of a model, each with the names of its adapters whose schedule is driven, see
    [`set_sparsity_step`].

    Raises:
        ValueError: if there are none, or several of which none is trainable.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PstLinear)]
    active = [(layer, name) for layer in layers for name in layer.present_adapters(layer.active_adapters)]
    if not active:
        raise ValueError(
            f"A sparsity schedule drives PST layers, got {type(model).__name__} without an active one; make them with "
            "`get_peft_model(model, PstConfig(...))`."
        )
    names = {name for _, name in active}
    if len(names) == 1:
        return active
    trainable = {name for layer, name in active if layer.is_trainable(name)}
    if not trainable:
        raise ValueError(
            f"Of several active adapters a sparsity schedule drives those that are trained, got {sorted(names)}, all "
            "of them frozen; call `set_adapter` with the one to drive."
        )
    return [(layer, name) for layer, name in active if name in trainable]


def warn_about_schedule(model: nn.Module, adapter_name: str, doing: str) -> None:
    """Warn if an adapter has not reached its final sparsity.

    Args:
        doing: `"Merging"`, which warns whenever that is so, or `"Saving"`, which training does on the way and which
            warns only if the schedule never advanced and nothing in this process drove it.
    """
    layers = [m for m in model.modules() if isinstance(m, PstLinear) and adapter_name in m.pst_pruned]
    progress = [layer.sparsity_progress(adapter_name) for layer in layers]
    never_advanced = all(now == start for start, now, _ in progress)
    driven = any(layer.is_driven(adapter_name) for layer in layers)
    if all(now == end for _, now, end in progress) or (doing == "Saving" and (driven or not never_advanced)):
        return
    now, end = (_share(layers, [counts[i] for counts in progress], adapter_name) for i in (1, 2))
    state = "never advanced" if never_advanced else "stopped on the way"
    warnings.warn(
        f"{doing} the PST adapter '{adapter_name}' at {now:.1%} sparsity instead of {end:.1%}: its schedule {state}. "
        f"To prune while training, {WAY_OUT}.",
        stacklevel=3,
    )


def _share(layers: list[PstLinear], pruned: list[int], adapter_name: str) -> float:
    """The share of zeros in all layers together, given the weights pruned in each comparison group of each."""
    zeros = sum(count * layer.num_groups(adapter_name) for layer, count in zip(layers, pruned, strict=True))
    return zeros / sum(layer.in_features * layer.out_features for layer in layers)


class PstModel(SparseTuner):
    """Prunes a dense model while it tunes it (arXiv 2205.11005).

    Made by `get_peft_model(model, PstConfig(...))`. Warns at save and at merge if the schedule never moved.
    """

    prefix: str = "pst_"
    tuner_layer_cls = PstLinear

    def set_sparsity_step(self, step: int, total_steps: int | None = None) -> None:
        """Set every layer to its sparsity after `step` of `total_steps` optimizer steps; arguments and errors as for
        [`peft_sparse.tuners.pst.set_sparsity_step`]."""
        set_sparsity_step(self.model, step, total_steps)

    def _prepare_model(self, peft_config: PstConfig, model: nn.Module) -> None:
        by_default = peft_config.target_modules is None
        super()._prepare_model(peft_config, model)
        if by_default:
            warn_of_dense_parameters(model)

    def _check_target(self, name: str, module: nn.Module) -> None:
        super()._check_target(name, module)
        if (stored := bits(unwrap(module))) is not None:
            raise ValueError(
                f"PST selects by the magnitudes of a dense weight, got `{name}`, which is quantised to {stored} bits: "
                "its weights tie by the thousand, and a pruned one could not come back; load the model without "
                "`quantization_config` (bfloat16 takes PST's factors too), or prune it, quantise it and tune it with "
                "`SppConfig`."
            )
        if isinstance(unwrap(module), PackedLinear):
            raise ValueError(
                f"PST prunes a dense model while it tunes it, got `{name}`, which is packed: what is pruned there has "
                "no place to come back to; use `SppConfig`, or call `unpack_model(model)` first."
            )

    def _check_targets(self, targets: dict[str, nn.Module], peft_config: PstConfig) -> None:
        pattern = parse_pattern(peft_config.pattern)
        rank = max(peft_config.r, peft_config.score_r)
        for name, module in targets.items():
            in_features, out_features = in_out_features(unwrap(module))
            pattern.check_width(in_features, name)
            if rank > max(MAX_RANK, in_features, out_features):  # before memory for it is asked for
                raise ValueError(
                    f"The factors of a layer are smaller than its weight, got rank {rank} for `{name}`, which is "
                    f"{out_features} x {in_features}; take a smaller `r` and `score_r`, such as 8."
                )
        if peft_config.sparsity_pattern:
            sparsities_by_name("sparsity_pattern", peft_config.sparsity_pattern, list(targets), peft_config.sparsity)

    @classmethod
    def _check_loaded(cls, model: nn.Module, adapter_name: str, loaded: dict[str, torch.Tensor]) -> None:
        for name, layer in model.named_modules():
            pruned = loaded.get(f"{name}.pst_pruned.{adapter_name}")
            if not isinstance(layer, PstLinear) or pruned is None or pruned.is_meta:
                continue
            size = layer.group_size(adapter_name)
            if not 0 <= int(pruned) < size:
                raise ValueError(
                    f"`pst_pruned` counts the pruned weights of each {size}, from 0 up to {size - 1}, got "
                    f"{int(pruned)} in `{name}`; the checkpoint is damaged, or its adapter has another pattern. "
                    "Nothing was loaded."
                )

    def _check_all_merges(self, adapter_names: list[str] | None, dtype: torch.dtype | None = None) -> None:
        super()._check_all_merges(adapter_names, dtype)
        for adapter_name in self.active_adapters if adapter_names is None else adapter_names:
            warn_about_schedule(self.model, adapter_name, doing="Merging")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PstConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        warn_about_schedule(model, adapter_name, doing="Saving")
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    if not hasattr(BaseTuner, "_get_adapter_state_dict"):  # PEFT 0.20, where saving asks for the whole state dict

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            for adapter_name in self.peft_config:
                warn_about_schedule(self.model, adapter_name, doing="Saving")
            return super().state_dict(*args, **kwargs)
