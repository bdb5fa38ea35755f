"""The linear of a packed weight for few tokens, forward alone: Y = X W^T + b, read as it lies, never unpacked.

On a CPU by the C kernels of `peft_sparse.native`, in float32, bfloat16 and float16, with sums in float32; on a GPU,
for one token in half precision, by a Triton kernel where `use_triton` is on. The plain twin is `packed_linear` in
`peft_sparse.ops.reference`.
"""

from __future__ import annotations

import torch

from peft_sparse.native import NativeBitmask, native_in_use
from peft_sparse.ops import reference
from peft_sparse.ops.triton_switch import triton_takes_bitmask
from peft_sparse.sparsity import PackedWeight


class BitmaskLinear:
    """The fast form of [`peft_sparse.ops.reference.packed_linear`] for few tokens and one weight, made ready once:
    same results up to the order of sums.

    An infinity or a NaN in X reaches Y where W is zero too, as in a dense product. Not differentiable.

    Args:
        weight: float32 or half precision on a CPU that has native kernels, half precision on a GPU. Its tensors are
            shared as far as they are contiguous.

    Attributes:
        weight: as the kernels read it: all of it on one device, `starts` int64.
    """

    def __init__(self, weight: PackedWeight) -> None:
        values, bitmask = weight.values.detach().contiguous(), weight.bitmask.contiguous()
        self.weight = PackedWeight(values, bitmask, weight.in_features, weight.starts.to(values.device, torch.int64))
        on_cpu = values.device.type == "cpu"
        self._product = NativeBitmask(values, bitmask, self.weight.starts, weight.in_features) if on_cpu else None

    def takes(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether the kernels compute this."""
        if self._product is None:
            return triton_takes_bitmask(x, self.weight, bias)
        weight = self.weight
        fits = x.dtype == weight.values.dtype and x.device.type == "cpu" and x.shape[-1] == weight.in_features
        return fits and x.numel() > 0 and native_in_use()

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Y, (..., out), of the dtype of `x`, which is (..., in) and [`BitmaskLinear.takes`] was asked about; `bias`
        is (out,) or None."""
        if reference.reference_in_use():
            return reference.packed_linear(x, self.weight, bias)
        if self._product is None:
            from peft_sparse.ops import triton_bitmask

            return triton_bitmask.forward(x, self.weight, bias)
        y = self._product(x)
        y = y if bias is None else y.add_(bias)
        return y if y.dtype == x.dtype else y.to(x.dtype)
