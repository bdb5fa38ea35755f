"""Autograd functions on tensors. `reference` holds the plain twin of each, under the same name and signature, and
`use_reference` puts it to work. `use_csr` says whether weights with few non-zeros are computed with those alone,
`use_triton` turns on the kernels of the `triton_*` modules."""

from peft_sparse.ops import reference
from peft_sparse.ops.bitmask_linear import BitmaskLinear
from peft_sparse.ops.csr_cache import CsrCache, use_csr
from peft_sparse.ops.csr_linear import CsrLinear, csr_linear
from peft_sparse.ops.packed_linear import packed_linear
from peft_sparse.ops.pst_linear import pst_linear
from peft_sparse.ops.pst_mask import MaskCache, pst_mask
from peft_sparse.ops.reference import PstFactors, PstScales, use_reference
from peft_sparse.ops.spp_csr import spp_csr_linear
from peft_sparse.ops.spp_linear import spp_linear, spp_linear_update
from peft_sparse.ops.spp_weight import spp_weight
from peft_sparse.ops.triton_switch import triton_in_use, use_triton
from peft_sparse.sparsity import CsrMatrix

__all__ = [
    "BitmaskLinear",
    "CsrCache",
    "CsrLinear",
    "CsrMatrix",
    "MaskCache",
    "PstFactors",
    "PstScales",
    "csr_linear",
    "packed_linear",
    "pst_linear",
    "pst_mask",
    "reference",
    "spp_csr_linear",
    "spp_linear",
    "spp_linear_update",
    "spp_weight",
    "triton_in_use",
    "use_csr",
    "use_reference",
    "use_triton",
]
