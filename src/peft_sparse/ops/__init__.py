"""Autograd functions on tensors. `reference` holds the plain twin of each, under the same name and signature, and
`use_reference` puts it to work. `use_triton` does the same with the kernels of the `triton_*` modules."""

from peft_sparse.ops import reference
from peft_sparse.ops.pst_linear import pst_linear
from peft_sparse.ops.pst_mask import MaskCache, pst_mask
from peft_sparse.ops.reference import PstFactors, PstScales, use_reference
from peft_sparse.ops.spp_linear import spp_linear, spp_linear_update
from peft_sparse.ops.triton_switch import triton_in_use, use_triton

__all__ = [
    "MaskCache",
    "PstFactors",
    "PstScales",
    "pst_linear",
    "pst_mask",
    "reference",
    "spp_linear",
    "spp_linear_update",
    "triton_in_use",
    "use_reference",
    "use_triton",
]
