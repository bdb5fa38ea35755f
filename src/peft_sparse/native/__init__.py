"""Packed weights on a CPU in C (bitmask.c): unpacking, and products with few tokens, which read n d + N / 8 bytes of a
weight of which n of N entries of d bytes are kept, where a dense product reads N d.

The kernels are compiled at their first use, if the machine has a C compiler, see build.py. Without them PyTorch does
the same: what they unpack is equal bit for bit, their products up to the order of sums.
"""

from peft_sparse.native.kernels import (
    PRODUCTS,
    NativeBitmask,
    NativeCsr,
    native_in_use,
    native_row_starts,
    native_takes,
    native_unpack,
    unavailable,
    use_native,
)

__all__ = [
    "PRODUCTS",
    "NativeBitmask",
    "NativeCsr",
    "native_in_use",
    "native_row_starts",
    "native_takes",
    "native_unpack",
    "unavailable",
    "use_native",
]
