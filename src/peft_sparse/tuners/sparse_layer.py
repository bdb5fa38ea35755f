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
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from peft_sparse.linears import (
    as_stored,
    bits,
    call_as,
    compute_dtype,
    dequantized_linear,
    device_of,
    gathered,
    has_hooks,
    in_out_features,
    is_dtensor,
    set_weight,
    stored_weight,
    weight_parameter,
    weights_loaded,
    writable,
)
from peft_sparse.sparsity import Weight, dense_weight, quantize_like, weight_entries, with_entries
from peft_sparse.tuners.merging import copy_to_restore, merged_into, rounded_to
from peft_sparse.tuners.offloading import adapters_loaded


class SparseLayer(nn.Module, BaseTunerLayer):
    """A tuner layer around nn.Linear, Conv1D, PackedLinear or a quantised linear. Weights are (out, in) in all of its
    methods, and packed where the base layer's is: then the effective weight is packed too, and the dense one is never
    formed. A quantised base weight is dequantised block by block in each forward and backward.

    Args:
        base_layer: the module that is wrapped; its weight stays frozen.
        name: its full name in the model.
    """

    # The plain dicts of a layer that keep something of its adapters, by their names.
    dicts_by_adapter: tuple[str, ...] = ("_first_versions",)

    base_layer: Any  # nn.Linear, Conv1D, PackedLinear, Linear4bit or Linear8bitLt
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
        self.cast_input_dtype_enabled = True  # what PEFT's `disable_input_dtype_casting` switches off
        self.merged_adapters: list[str] = []
        self.module_name = name
        self._weight_before_merge: Any = None
        self._bits = bits(base_layer)  # 4 or 8 of a quantised base layer, else None
        self._first_versions: dict[str, list[int | None]] = {}

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

    def prunes_untrained(self, adapter_name: str) -> bool:
        """Whether f(W) has zeros that W has not, though training has not reached the adapter (weights are here)."""
        return False

    # The rest

    def mark_new(self, adapter_name: str) -> None:
        """Remember the adapter's parameters as they are, for [`SparseLayer.is_new`]."""
        self._first_versions[adapter_name] = self._versions(adapter_name)

    def is_new(self, adapter_name: str) -> bool:
        """Whether no parameter of the adapter was changed, by training or loading, since it was added."""
        return self._first_versions.get(adapter_name) == self._versions(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and all that is kept about it."""
        for kept in self.dicts_by_adapter:
            getattr(self, kept).pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def take_out(self, adapter_name: str) -> list[tuple[Any, Any]]:
        """Remove what there is of an adapter, and leave open which are active: each container or dict that had
        something, and what it had."""
        holders = [*self.adapter_containers(), *(getattr(self, kept) for kept in self.dicts_by_adapter)]
        taken = [(holder, holder[adapter_name]) for holder in holders if adapter_name in holder]
        for holder, _ in taken:
            del holder[adapter_name]
        return taken

    def _versions(self, adapter_name: str) -> list[int | None]:
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        own = (tensors[adapter_name] for tensors in containers if adapter_name in tensors)
        return [None if factor.is_inference() else factor._version for factor in own]  # which have no versions

    @property
    def base_weight(self) -> Any:
        """The base layer's weight as (out, in), packed if it is stored packed."""
        return stored_weight(self.base_layer)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """f(W) - W, as the base layer stores its weight (a Conv1D's is transposed), in the weight's dtype. Dense."""
        with self.weights_loaded():
            weight = self.base_weight
            entries = weight_entries(weight)
            delta = weight_entries(self.effective_weight(adapter_name, weight)) - entries
            return as_stored(self.base_layer, dense_weight(with_entries(weight, delta.to(entries.dtype))))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_names = [] if self.disable_adapters or self.merged else self.present_adapters(self.active_adapters)
        if not adapter_names:
            return self.base_layer(x, *args, **kwargs)
        if not any(has_hooks(child) for child in self.children()):
            return self._adapted_forward(adapter_names, x)
        with adapters_loaded(self):
            return call_as(self.base_layer, partial(self._adapted_forward, adapter_names), x)

    def _adapted_forward(self, adapter_names: list[str], x: torch.Tensor) -> torch.Tensor:
        if self._bits is not None:  # as the base layer does, whose weight has no dtype to cast to
            return self._forward_adapters(x.to(compute_dtype(self.base_layer, x)), adapter_names).to(x.dtype)
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # which knows no meta device
            x = self._cast_input_dtype(x, weight_parameter(self.base_layer).dtype)
        return self._forward_adapters(x, adapter_names)

    def weights_loaded(self) -> Any:
        """A context in which the base weight and the adapters' are here and whole, to read, wherever accelerate keeps
        them and however they are sharded; of a sharded model all processes enter it at once. Yields whether it is."""
        return weights_loaded(self.base_layer, *self.adapter_containers())

    def adapter_containers(self) -> list[nn.Module]:
        """The modules that hold the adapters' parameters, by adapter."""
        return [child for name, child in self._modules.items() if name != "base_layer" and child is not None]

    def _forward_adapters(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        weight = self.base_weight
        for adapter_name in adapter_names[:-1]:
            weight = self.effective_weight(adapter_name, weight)
        return self.adapted_linear(x, weight, self.base_layer.bias, adapter_names[-1])

    def present_adapters(self, adapter_names: list[str]) -> list[str]:
        """Those of some adapters that this layer has, in their order."""
        available = self._get_available_adapters()
        return [name for name in adapter_names if name in available]

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str]) -> Weight:
        """The weight after merging `adapter_names` in order; nothing is written.

        Returns:
            (out, in), of the base weight's dtype, packed if that is; float32 for a quantised base weight.

        Raises:
            ValueError: if it holds NaN or infinity.
            RuntimeError: if its zeros, or its outputs, would not be those of the unmerged layer.
        """
        with gathered(self):
            return merged_into(self, self.base_weight, self.present_adapters(adapter_names))

    @torch.no_grad()
    def requantized(self, merged: Weight, dtype: torch.dtype | None = None) -> Weight:
        """What a quantised base layer can hold of its merged weight: codes and scales with the same zeros. For other
        base layers the merged weight itself.

        Args:
            dtype: keep a dense weight of this dtype instead.

        Raises:
            ValueError: if a zero would move, or the dtype cannot hold a weight.
        """
        if self._bits is None or not isinstance(merged, torch.Tensor):
            return merged
        if dtype is None:
            return quantize_like(self.base_weight, merged)
        return rounded_to(dtype, merged, self.module_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight of the adapters into the base weight.

        Args:
            safe_merge: as in PEFT. The checks are made in either case, before anything is written.
            adapter_names: the adapters to merge, in order; None: the active ones.

        Raises:
            ValueError, RuntimeError: see [`SparseLayer.merged_weight`]. The base weight is untouched then.
        """
        adapter_names = self.present_adapters(check_adapters_to_merge(self, adapter_names))
        if not adapter_names:
            return
        own = weight_parameter(self.base_layer).detach()
        with gathered(self, write=[self.base_layer]):
            merged = self.requantized(self.merged_weight(adapter_names))
            if not self.merged:
                self._weight_before_merge = copy_to_restore(self.base_layer, own)
            set_weight(self.base_layer, merged)
        self.merged_adapters.extend(adapter_names)

    def dequantized(self, dtype: torch.dtype, adapter_names: list[str] | None = None) -> nn.Linear:
        """A quantised base layer with adapters merged, those merged before included, as a new nn.Linear."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = self.merged_adapters + [name for name in names if name not in self.merged_adapters]
        if self.merged:
            self.unmerge()
        weight = self.requantized(dense_weight(self.merged_weight(names)), dtype)
        return dequantized_linear(self.base_layer, dense_weight(weight))

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
                f"Unmerging writes into this process's share of a weight, got the whole one of `{self.module_name}`, "
                "which lives as long as a forward; call `unmerge_adapter()` before disabling adapters."
            )
        with torch.no_grad(), writable(self.base_layer):
            if self._bits is not None:
                set_weight(self.base_layer, before)
            elif is_dtensor(before):
                weight_parameter(self.base_layer).copy_(before)
            else:
                with gathered(self.base_layer, write=[self.base_layer]):
                    weight_parameter(self.base_layer).copy_(before)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        """Where PEFT puts new and loaded adapters; it would read `weight`, which may be packed or offloaded. No dtype,
        unless it is the wider one: rounded factors may select another mask."""
        parameter = weight_parameter(base_layer)
        return device_of(parameter, base_layer), torch.float64 if parameter.dtype == torch.float64 else None

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].partition('_')[0]}.{super().__repr__()}"
