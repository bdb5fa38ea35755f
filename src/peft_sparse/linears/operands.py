"""A linear's weight in the forms in which its zeros save time, each with the kernel that multiplies with it.

    csr              lists of the non-zeros, on a CPU, by our C kernels, or in float32 and float64 by MKL
    semi_structured  2:4 in the form of NVIDIA's sparse tensor cores, by torch itself, in half precision
    bitmask          values and a bit for each place, for few tokens on a CPU by our C kernels, for one on a GPU by our
                     Triton kernel where it is on

None of them has a backward. Whether one is faster is for `peft_sparse.inference` to measure.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft_sparse.linears.weights import in_out_features, stored_weight, weight_parameter
from peft_sparse.native import PRODUCTS, unavailable
from peft_sparse.ops import BitmaskLinear, CsrLinear, triton_in_use
from peft_sparse.ops.triton_switch import MIN_CAPABILITY, triton_takes_bitmask
from peft_sparse.sparsity import PackedWeight, dense_weight

HALF = (torch.float16, torch.bfloat16)


class Operand:
    """One form of a weight. A subclass says where it can be used and multiplies with it.

    Attributes:
        name: in reports.
        device_types: that it is meant for.
        nbytes: that it takes beyond the linear's own weight.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]
    nbytes: int

    @classmethod
    def refusal(cls, linear: nn.Module) -> str | None:
        """Why this linear cannot be computed this way; None if it can."""
        raise NotImplementedError

    @classmethod
    def of(cls, linear: nn.Module) -> Operand:
        """The weight of a linear in this form, as it is now."""
        raise NotImplementedError

    def takes(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether it multiplies this input, which has the weight's dtype and device."""
        return True

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Y = X W^T + b: (..., out) from (..., in)."""
        raise NotImplementedError


class CsrOperand(Operand):
    """Lists of the non-zeros: values, which are shared with a PackedLinear, and columns in 2 bytes each, in 4 without
    native kernels."""

    name, device_types = "csr", ("cpu",)

    def __init__(self, linear: CsrLinear) -> None:
        self.linear, self.nbytes = linear, linear.nbytes

    @classmethod
    def refusal(cls, linear: nn.Module) -> str | None:
        weight = weight_parameter(linear)
        if weight.device.type != "cpu":
            return f"csr runs on a CPU, not on {weight.device.type}"
        reason = CsrLinear.refusal(weight.dtype, in_out_features(linear)[0])
        return reason and f"csr {reason}"

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Module) -> CsrOperand:
        return cls(CsrLinear(stored_weight(linear)))

    def takes(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        return self.linear.takes(x)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.linear(x, bias)


class SemiStructuredOperand(Operand):
    """The kept half of a 2:4 weight and where it lies: 9/16 of the dense bytes in half precision."""

    name, device_types = "semi_structured", ("cuda",)

    def __init__(self, weight: torch.Tensor, nbytes: int) -> None:
        self.weight, self.nbytes = weight, nbytes

    @classmethod
    def refusal(cls, linear: nn.Module) -> str | None:
        weight = weight_parameter(linear)
        if weight.device.type != "cuda" or torch.version.hip is not None:
            return f"semi_structured runs on an NVIDIA GPU, not on {weight.device.type}"
        if weight.dtype not in HALF:
            return f"semi_structured computes in half precision, not in {str(weight.dtype).removeprefix('torch.')}"
        if torch.cuda.get_device_capability(weight.device) < MIN_CAPABILITY:
            return "semi_structured needs a GPU of compute capability 8.0 or later"
        if not is_two_of_four(dense_weight(stored_weight(linear))):
            return "semi_structured needs a 2:4 weight"
        return None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Module) -> SemiStructuredOperand:
        from torch.sparse import to_sparse_semi_structured

        weight = dense_weight(stored_weight(linear)).detach()
        in_bits = 8 * weight.element_size()
        return cls(to_sparse_semi_structured(weight.contiguous()), weight.nbytes // 2 * (in_bits + 2) // in_bits)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


class BitmaskOperand(Operand):
    """Values and bitmask, as in the packed format; those of a PackedLinear are shared."""

    name, device_types = "bitmask", ("cpu", "cuda")

    def __init__(self, linear: BitmaskLinear, nbytes: int) -> None:
        self.linear, self.nbytes = linear, nbytes

    @classmethod
    def refusal(cls, linear: nn.Module) -> str | None:
        weight = weight_parameter(linear)
        dtype, on_cpu = str(weight.dtype).removeprefix("torch."), weight.device.type == "cpu"
        if not on_cpu and not triton_in_use():
            return "bitmask is off on GPUs (`ops.use_triton` turns it on; slower than dense on an H200)"
        if weight.dtype not in (PRODUCTS if on_cpu else HALF):
            return f"bitmask is for {'float32 and half' if on_cpu else 'half'} precision, not for {dtype}"
        if on_cpu:
            reason = unavailable()
            return None if reason is None else f"bitmask needs native kernels, which {reason}"
        tiny = PackedWeight.of(weight.new_ones(1, 8))
        tiny = tiny._replace(starts=tiny.starts.to(weight.device))
        return (
            None
            if triton_takes_bitmask(weight.new_ones(8), tiny, None)
            else f"bitmask does not run on {weight.device}"
        )

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Module) -> BitmaskOperand:
        stored = stored_weight(linear)
        packed = stored if isinstance(stored, PackedWeight) else PackedWeight.of(dense_weight(stored).detach())
        made = BitmaskLinear(packed)
        own = 0 if isinstance(stored, PackedWeight) else packed.values.nbytes + packed.bitmask.nbytes
        return cls(made, made.weight.starts.nbytes + own)

    def takes(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        return self.linear.takes(x, bias)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.linear(x, bias)


OPERANDS: dict[str, type[Operand]] = {kind.name: kind for kind in (CsrOperand, SemiStructuredOperand, BitmaskOperand)}


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether each four consecutive weights along the rows have two zeros at least."""
    groups = weight.shape[1] // 4
    return weight.shape[1] % 4 == 0 and int((weight != 0).reshape(-1, groups, 4).sum(-1).max()) <= 2
