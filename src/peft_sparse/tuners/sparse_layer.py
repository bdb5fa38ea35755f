"""What the layers of both methods share: a linear whose effective weight is a function f of its base weight.

A method says what f is ([`SparseLayer.effective_weight`]) and how to compute a linear with it without forming f(W)
([`SparseLayer.adapted_linear`]). Here is the rest: several active adapters compose in order, W -> f_b(f_a(W)); merging
writes that weight into the base layer after checking that zeros and function are the same; unmerging puts a kept copy
back.

Of a sharded model (FSDP2, ZeRO-3) a forward sees whole weights. What is asked for outside of one is gathered first, so
that all processes have to ask for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from peft_sparse import ops
from peft_sparse.linears import (
    as_stored,
    gathered,
    in_out_features,
    is_dtensor,
    set_weight,
    stored_weight,
    weight_parameter,
)
from peft_sparse.sparsity import Weight, dense_weight, round_keeping_support, weight_entries, with_entries

# Largest relative difference between the outputs of the adapted and of the merged layer that rounding explains.
# float32 allows for TF32 matmuls.
MERGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
PROBE_ROWS = 4


class SparseLayer(nn.Module, BaseTunerLayer):
    """A tuner layer around nn.Linear, Conv1D or PackedLinear. Weights are (out, in) in all of its methods, and packed
    where the base layer's is: then the effective weight is packed too, and the dense one is never formed.

    Args:
        base_layer: the module that is wrapped; its weight stays frozen.
        name: its full name in the model, for messages.
    """

    base_layer: Any  # nn.Linear, Conv1D or PackedLinear
    # PEFT's part of the layer, for type checkers that do not look into it
    active_adapters: list[str]
    adapter_layer_names: tuple[str, ...]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[..., torch.Tensor]
    _get_available_adapters: Callable[[], set[str]]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_out_features(base_layer)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._module_name = name
        self._weight_before_merge: torch.Tensor | None = None
        self._first_versions: dict[str, list[int]] = {}

    # What a method defines

    def update_layer(self, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Add an adapter with fresh parameters, as `config` says."""
        raise NotImplementedError

    def effective_weight(self, adapter_name: str, weight: Any = None) -> Any:
        """f(W): the weight that the forward uses, (out, in) in at least float32, differentiable.

        Args:
            weight: W, a tensor, or a PackedWeight where the method takes those; None: the base weight as it is now.
        """
        raise NotImplementedError

    def adapted_linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, adapter_name: str
    ) -> torch.Tensor:
        """X f(W)^T + b, without dropout: what `merge` promises to reproduce."""
        raise NotImplementedError

    def support(self, adapter_name: str, weight: Any) -> torch.Tensor:
        """Where f(W) is not zero, bool (out, in); of a packed weight, for each of its values."""
        raise NotImplementedError

    # The rest

    def mark_new(self, adapter_name: str) -> None:
        """Remember the adapter's parameters as they are, for [`SparseLayer.is_new`]."""
        self._first_versions[adapter_name] = self._versions(adapter_name)

    def is_new(self, adapter_name: str) -> bool:
        """Whether no parameter of the adapter was changed, by training or loading, since it was added."""
        return self._first_versions.get(adapter_name) == self._versions(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and all that is kept about it."""
        self._first_versions.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _versions(self, adapter_name: str) -> list[int]:
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        return [tensors[adapter_name]._version for tensors in containers if adapter_name in tensors]

    @property
    def base_weight(self) -> Any:
        """The base layer's weight as (out, in), packed if it is stored packed."""
        return stored_weight(self.base_layer)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """f(W) - W, as the base layer stores its weight (a Conv1D's is transposed), in the weight's dtype. Dense."""
        with gathered(self):
            weight = self.base_weight
            entries = weight_entries(weight)
            delta = weight_entries(self.effective_weight(adapter_name, weight)) - entries
            return as_stored(self.base_layer, dense_weight(with_entries(weight, delta.to(entries.dtype))))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_names = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        if not adapter_names:
            return self.base_layer(x, *args, **kwargs)
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, weight_parameter(self.base_layer).dtype)
        return self._forward_adapters(x, adapter_names)

    def _forward_adapters(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        weight = self.base_weight
        for adapter_name in adapter_names[:-1]:
            weight = self.effective_weight(adapter_name, weight)
        return self.adapted_linear(x, weight, self.base_layer.bias, adapter_names[-1])

    def _present(self, adapter_names: list[str]) -> list[str]:
        available = self._get_available_adapters()
        return [name for name in adapter_names if name in available]

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str]) -> Weight:
        """The weight after merging `adapter_names` in order; nothing is written.

        Returns:
            (out, in), of the base weight's dtype, packed if that is.

        Raises:
            ValueError: if it holds NaN or infinity.
            RuntimeError: if its zeros, or its outputs, would not be those of the unmerged layer.
        """
        with gathered(self):
            weight = self.base_weight
            for adapter_name in self._present(adapter_names):
                weight = self._merged_into(weight, adapter_name)
            return weight

    def _merged_into(self, weight: Weight, adapter_name: str) -> Weight:
        effective, support = self.effective_weight(adapter_name, weight), self.support(adapter_name, weight)
        entries = round_keeping_support(weight_entries(effective), support, weight.dtype)
        self._check_finite(entries, adapter_name)
        merged = with_entries(effective, entries)
        self._check_merge(merged, support, weight, adapter_name)
        return merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight of the adapters into the base weight.

        Args:
            safe_merge: as in PEFT. The checks are made in either case, before anything is written.
            adapter_names: the adapters to merge, in order; None: the active ones.

        Raises:
            ValueError, RuntimeError: see [`SparseLayer.merged_weight`]. The base weight is untouched then.
        """
        adapter_names = self._present(check_adapters_to_merge(self, adapter_names))
        if not adapter_names:
            return
        own = weight_parameter(self.base_layer).detach()
        with gathered(self, write=[self.base_layer]):
            merged = self.merged_weight(adapter_names)
            if not self.merged:
                # FSDP2's share of it is enough; ZeRO-3 has none that could be kept in this way
                whole = weight_parameter(self.base_layer).detach()
                self._weight_before_merge = (own if own.shape == whole.shape else whole).clone()
            set_weight(self.base_layer, merged)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit.

        Raises:
            RuntimeError: in a forward of a sharded model, where it would be lost.
        """
        before = self._weight_before_merge
        if before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if is_dtensor(before) != is_dtensor(weight_parameter(self.base_layer)):
            raise RuntimeError(
                f"Unmerging writes into this process's share of a weight, got the whole one of `{self._module_name}`, "
                "which lives as long as a forward; call `unmerge_adapter()` before disabling adapters."
            )
        with torch.no_grad():
            if is_dtensor(before):
                weight_parameter(self.base_layer).copy_(before)
            else:
                with gathered(self.base_layer, write=[self.base_layer]):
                    weight_parameter(self.base_layer).copy_(before)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def _check_finite(self, merged: torch.Tensor, adapter_name: str) -> None:
        if merged.isfinite().all():
            return
        found = int((~merged.isfinite()).sum())
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: merging needs "
            f"finite weights, got {found} NaN or infinite ones of {merged.numel()} in `{self._module_name}`; train "
            "with a lower learning rate, or load an earlier checkpoint. Nothing was merged."
        )

    def _check_merge(self, merged: Weight, support: torch.Tensor, weight: Weight, adapter_name: str) -> None:
        entries = weight_entries(merged)
        moved = int(((entries != 0) != support).sum())
        if moved:
            raise RuntimeError(
                f"Merging keeps every zero of the forward, got {moved} that differ in `{self._module_name}` (adapter "
                f"{adapter_name}). Nothing was merged; please report this with your config."
            )
        generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
        probe = torch.randn(PROBE_ROWS, self.in_features, generator=generator).to(entries)
        with torch.autocast(device_type=entries.device.type, enabled=False):
            expected = self.adapted_linear(probe, weight, None, adapter_name).double()
            difference = (ops.packed_linear(probe, merged, None).double() - expected).norm()
        tolerance = MERGE_TOLERANCE[entries.dtype]
        if not difference <= tolerance * expected.norm().clamp_min(torch.finfo(entries.dtype).tiny):
            raise RuntimeError(
                f"Merging keeps the layer's function, got outputs that differ by {difference / expected.norm():.1e} "
                f"(relative; at most {tolerance:.0e} is rounding) in `{self._module_name}` (adapter {adapter_name}). "
                "Nothing was merged; please report this with your config."
            )

    # PEFT looks for `weight`, which a PackedLinear unpacks for each look.

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = weight_parameter(base_layer)
        return parameter.device, parameter.dtype

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].partition('_')[0]}.{super().__repr__()}"
