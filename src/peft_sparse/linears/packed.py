"""A linear that holds its weight without the zeros: the kept values, and a bit for each place.

Its forward unpacks the weight block of rows by block, so that a pruned model trains and runs in the memory of its
packed weights: n of N weights in a dtype of d bytes take n d + N / 8 bytes. This is for sparse models what QLoRA's
(arXiv 2305.14314) frozen 4-bit base is for quantized ones, but lossless: the same numbers as the dense weight gives.

Unpacking costs the same for one token as for a thousand. It is little beside a training step, and most of the time
when text is generated token by token: call `unpack_model` or `accelerate_sparse` before that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse._graphs import values_unknown
from peft_sparse.ops import packed_linear
from peft_sparse.sparsity import PackedWeight, packed_fault, row_starts


class PackedLinear(nn.Module):
    """Y = X W^T + b of a weight that is stored packed.

    Args:
        values: (nnz,), the entries that are kept, in row-major order of (out, in).
        bitmask: uint8 (out, ceil(in / 8)), 1 = kept, least significant bit first, see
            [`peft_sparse.sparsity.pack_mask`].
        in_features: columns of the weight.
        bias: (out,) or None.
        conv1d: whether this stands for a transformers Conv1D, which [`PackedLinear.to_linear`] gives back.

    Attributes:
        values: a frozen parameter. Its gradient, if you ask for one, is that of the kept entries; zeros stay zeros.
        bitmask: a persistent buffer.

    Raises:
        ValueError: if they do not describe a weight.

    Examples:
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, 3.0]]))
        >>> packed = PackedLinear.from_linear(linear)
        >>> packed.values.tolist(), packed.bitmask.tolist()
        ([1.5, 2.0, 3.0], [[2], [5]])
        >>> packed(torch.ones(1, 3))
        tensor([[1.5000, 5.0000]])
    """

    bitmask: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        values: torch.Tensor,
        bitmask: torch.Tensor,
        in_features: int,
        bias: torch.Tensor | None = None,
        *,
        conv1d: bool = False,
    ) -> None:
        super().__init__()
        starts = _check(values, bitmask, in_features, bias)
        self.in_features, self.out_features, self.conv1d = in_features, bitmask.shape[0], conv1d
        self.values = nn.Parameter(values.detach(), requires_grad=False)
        self.register_buffer("bitmask", bitmask)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self._starts = None if starts is None else (bitmask, starts)

    @classmethod
    def from_linear(cls, module: nn.Module) -> PackedLinear:
        """Pack an nn.Linear or a transformers Conv1D. The bias is the same parameter as before.

        Lossless, but for a negative zero, which comes back as a positive one.
        """
        conv1d = isinstance(module, Conv1D)
        weight = module.get_parameter("weight").detach()
        packed = PackedWeight.of(weight.T.contiguous() if conv1d else weight)
        bias = cast("nn.Parameter | None", module.bias)
        made = cls(packed.values, packed.bitmask, packed.in_features, bias, conv1d=conv1d)
        return made.train(module.training)

    def to_linear(self) -> nn.Module:
        """The inverse of [`PackedLinear.from_linear`]: a new nn.Linear or Conv1D, frozen as this one is."""
        linear: Any
        with torch.device("meta"):
            if self.conv1d:
                linear = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.dense_weight().detach()
        linear.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight, self.values.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight as the ops take it. It shares this module's tensors."""
        return PackedWeight(self.values, self.bitmask, self.in_features, self._row_starts())

    def dense_weight(self) -> torch.Tensor:
        """The weight as a new tensor, (out, in): for a look at one layer, not for a forward."""
        return self.packed_weight.dense()

    @property
    def weight(self) -> torch.Tensor:
        """[`PackedLinear.dense_weight`], for code that looks at the weight of a linear, as T5 does for its dtype.
        Unpacked for each look; what is written into it is lost."""
        return self.dense_weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.packed_weight, self.bias)

    def extra_repr(self) -> str:
        kept = self.values.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={kept:.1%}"
        )

    # Row starts follow from the bitmask: they are not stored, and made anew after the bitmask was replaced.

    def _row_starts(self) -> torch.Tensor:
        if self._starts is None or self._starts[0] is not self.bitmask:
            if values_unknown(self.bitmask):
                return row_starts(self.bitmask)
            with torch.inference_mode(False):  # training may need them after evaluation
                self._starts = (self.bitmask, row_starts(self.bitmask))
        return self._starts[1]

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        super()._apply(*args, **kwargs)
        self._starts = None  # would keep the bitmask of the other device
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        values, bitmask = state_dict.get(f"{prefix}values"), state_dict.get(f"{prefix}bitmask")
        try:  # a bitmask that does not fit its values would shift all that follow
            if values is not None and bitmask is not None:
                _check(values, bitmask, self.in_features, None)
            if values is not None and values.shape != self.values.shape:  # the bitmask would be taken without them
                raise ValueError(
                    f"A state dict has as many values as the layer, {self.values.numel()}, got {values.numel()} of "
                    "another mask; load that model with `load_sparse(..., packed=True)`, or pack its dense weights."
                )
        except ValueError as error:
            error_msgs.append(f"`{prefix.removesuffix('.')}`: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._starts = None  # the bitmask was written in place


def _check(
    values: torch.Tensor, bitmask: torch.Tensor, in_features: int, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """The row starts of a valid packed weight; None for tensors without memory.

    Raises:
        ValueError: if it is none."""
    way_out = "make it with `PackedLinear.from_linear`, or repack the weight"
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(
            f"`values` has one dimension and a floating dtype, got {tuple(values.shape)} {values.dtype}; {way_out}."
        )
    if bitmask.dim() != 2 or in_features < 1:
        raise ValueError(
            f"`bitmask` is (out, ceil(in / 8)) with in_features from 1 up, got {tuple(bitmask.shape)} and in_features="
            f"{in_features}; {way_out}."
        )
    if bias is not None and tuple(bias.shape) != (bitmask.shape[0],):
        raise ValueError(f"`bias` is (out,), here ({bitmask.shape[0]},), got {tuple(bias.shape)}; {way_out}.")
    if values.is_meta or bitmask.is_meta:
        return None
    fault = packed_fault(values, bitmask, bitmask.shape[0], in_features)
    if fault:
        raise ValueError(f"The parts of a packed weight fit each other: {fault}; {way_out}.")
    return row_starts(bitmask)
