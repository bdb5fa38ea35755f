"""Packed weights on a CPU in C: packing and unpacking (bitmask.c), and products of values and bitmask, or of values
and their columns (csr.c), which read what is kept of a weight, where a dense product reads all of it.

The kernels are compiled at their first use, if the machine has a C compiler, see build.py. Without them PyTorch does
the same: what they pack and unpack is equal bit for bit, their products up to the order of sums.
"""

from peft_sparse.native.library import PRODUCTS, native_in_use, unavailable, use_native
from peft_sparse.native.packing import native_nonzeros, native_pack, native_row_starts, native_takes, native_unpack
from peft_sparse.native.products import NativeBitmask, NativeCsr

__all__ = [
    "PRODUCTS",
    "NativeBitmask",
    "NativeCsr",
    "native_in_use",
    "native_nonzeros",
    "native_pack",
    "native_row_starts",
    "native_takes",
    "native_unpack",
    "unavailable",
    "use_native",
]
