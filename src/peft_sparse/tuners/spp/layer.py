"""SPP's layer: W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]) (arXiv 2405.16057).

The pattern is implied by W == 0 and kept by the product, so no mask is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from peft_sparse import ops
from peft_sparse.linears import weight_parameter
from peft_sparse.sparsity import Weight, weight_entries
from peft_sparse.tuners.sparse_layer import SparseLayer
from peft_sparse.tuners.spp.config import ONES, SppConfig


class SppLinear(SparseLayer):
    """A linear whose non-zero weights are rescaled by a factor of rank one per row group.

    Attributes:
        spp_A: (r, in), a row per row group; r is at most out_features.
        spp_B: (out,).
    """

    adapter_layer_names = ("spp_A", "spp_B")
    other_param_names = ("spp_dropout",)
    dicts_by_adapter = (*SparseLayer.dicts_by_adapter, "_scaling")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.spp_A = nn.ParameterDict({})
        self.spp_B = nn.ParameterDict({})
        self.spp_dropout = nn.ModuleDict({})
        self._scaling: dict[str, float] = {}
        self._csr = ops.CsrCache()

    def update_layer(self, adapter_name: str, config: SppConfig, **kwargs: Any) -> None:
        """Add an adapter. `A` starts kaiming-uniform and `B` at zero, as the authors' do, unless the config says
        otherwise."""
        num_groups = min(config.r, self.out_features)
        A, B = torch.zeros(num_groups, self.in_features), torch.zeros(self.out_features)
        if config.init_weights == ONES:
            nn.init.ones_(B)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(B)
        self.spp_A[adapter_name], self.spp_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        self.spp_dropout[adapter_name] = nn.Dropout(config.spp_dropout) if config.spp_dropout else nn.Identity()
        self._scaling[adapter_name] = config.spp_alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.spp_A[adapter_name], self.spp_B[adapter_name], self._scaling[adapter_name]

    def effective_weight(self, adapter_name: str, weight: Weight | None = None) -> Weight:
        weight = self.base_weight if weight is None else weight
        return ops.spp_weight(weight, *self._factors(adapter_name))

    def adapted_linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapter_name: str
    ) -> torch.Tensor:
        factors = self._factors(adapter_name)
        csr = self._non_zeros(x, weight, *factors)
        if csr is not None:
            return ops.spp_csr_linear(x, csr, bias, *factors)
        return ops.spp_linear(x, weight, bias, *factors)

    def _adapted_update(self, x: torch.Tensor, weight: Weight, adapter_name: str) -> torch.Tensor:
        """X (f(W) - W)^T."""
        factors = self._factors(adapter_name)
        csr = self._non_zeros(x, weight, *factors)
        if csr is not None:
            return ops.spp_csr_linear(x, csr, None, *factors, offset=0.0)
        return ops.spp_linear_update(x, weight, *factors)

    def _non_zeros(
        self, x: torch.Tensor, weight: Weight, A: torch.Tensor, B: torch.Tensor, _: float
    ) -> ops.CsrMatrix | None:
        """Those of the base weight, where computing with them alone is faster; not of one that another adapter has
        changed, which is new in every forward, nor of a packed one, whose memory the list of places would double."""
        if not isinstance(weight, torch.Tensor):
            return None
        base = weight_parameter(self.base_layer)
        is_base = weight is base or weight._base is base  # the view of a weight that is stored transposed
        return self._csr.get(x, weight, A, B) if is_base else None

    def support(self, adapter_name: str, weight: Weight) -> torch.Tensor:
        return weight_entries(weight) != 0

    def _forward_adapters(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if not any(self._drops(name) for name in adapter_names):
            return super()._forward_adapters(x, adapter_names)
        # Each adapter's own update sees its own dropped input: X W^T + sum of drop_k(X) (W_k - W_(k-1))^T.
        weight = self.base_weight
        y = ops.packed_linear(x, weight, self.base_layer.bias)
        for index, name in enumerate(adapter_names):
            if index:  # after the last adapter it would be formed for nothing
                weight = self.effective_weight(adapter_names[index - 1], weight)
            y = y + self._adapted_update(self.spp_dropout[name](x), weight, name)
        return y

    def _drops(self, adapter_name: str) -> bool:
        dropout = self.spp_dropout[adapter_name]
        return dropout.training and isinstance(dropout, nn.Dropout)
