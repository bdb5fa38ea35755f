"""The compiled C kernels, their switch, and the threads that they run on."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from ctypes import c_int, c_int64, c_void_p

import torch

from peft_sparse._switch import Switch
from peft_sparse.native.build import Broken, Unavailable, load_library

VARIABLE = "PEFT_SPARSE_NATIVE"
PRODUCTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SHARED_FROM = 1 << 15  # weights: to wake other threads takes longer than to do less alone
BITS = {2: 16, 4: 32, 8: 64}  # of an entry that is packed or unpacked, by its bytes

_RUNTIME = (c_void_p, c_void_p, c_void_p, c_int)  # `openmp` and `threads`
_WEIGHT = (c_void_p, c_void_p, c_void_p, c_int64, c_int64)  # values, bitmask or columns, starts, and two sizes
_SIGNATURES = {
    "row_starts": (c_void_p, c_int64, c_int64, c_void_p),
    **{f"{kernel}_{bits}": (*_RUNTIME, *_WEIGHT, c_void_p) for kernel in ("pack", "unpack") for bits in BITS.values()},
    **{f"mark_{bits}": (*_RUNTIME, c_void_p, c_int64, c_int64, c_void_p) for bits in BITS.values()},
    "list_columns": (c_void_p, c_int64, c_int64, c_void_p),
    **{
        f"{kernel}_{dtype}": (*_RUNTIME, *_WEIGHT, c_int64, c_void_p, c_void_p)
        for kernel in ("bitmask", "csr_few", "csr_many")
        for dtype in PRODUCTS.values()
    },
}


class use_native(Switch):
    """Whether packed weights on a CPU are computed with C kernels, which are compiled at their first use.

    On by default, as far as the machine can have them: Linux on x86-64 with AVX2 or AVX-512, and a C compiler (`CC`,
    or cc, gcc or clang). The environment variable `PEFT_SPARSE_NATIVE=0` turns them off from the start, and then
    nothing is compiled. What is unpacked is the same bit for bit; products, which only `accelerate_sparse` makes use
    of, differ in the order of sums.

    Args:
        enabled: False leaves everything to PyTorch.

    Examples:
        >>> with use_native(enabled=False):
        ...     native_in_use()
        False
    """

    _enabled = True


def _switched_from_outside() -> bool:
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is 1 (on) or 0 (off), got {value!r}.")
    return value == "1"


if not _switched_from_outside():
    use_native(enabled=False)


def native_in_use() -> bool:
    """Whether [`use_native`] is on and there are kernels. The first call compiles them."""
    return use_native._enabled and _library() is not None


def unavailable() -> str | None:
    """Why there are no native kernels, after "native kernels"; None if there are."""
    if not use_native._enabled:
        return f"are switched off ({VARIABLE}=0 or `use_native(False)`)"
    _library()
    return _reason


_reason: str | None = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, checked on a small weight; None, and `_reason` says why, if there are none."""
    global _reason
    try:
        library = load_library()
        for name, parameters in _SIGNATURES.items():
            getattr(library, name).argtypes, getattr(library, name).restype = parameters, None
        _check(library)
    except Unavailable as error:
        _reason = str(error)
        if isinstance(error, Broken):
            warnings.warn(f"peft_sparse's native kernels {_reason}; PyTorch computes the same.", stacklevel=2)
        return None
    return library


def loaded() -> ctypes.CDLL:
    """The kernels, where [`native_in_use`] has said that there are some."""
    library = _library()
    assert library is not None, "native_in_use() was not asked"
    return library


@functools.cache
def openmp() -> tuple[int | None, ...]:
    """The entry points of the OpenMP runtime that torch has loaded; all None if they are not to be found."""
    process = ctypes.CDLL(None)
    try:
        found = [getattr(process, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except AttributeError:
        return (None,) * 3
    return tuple(ctypes.cast(function, c_void_p).value for function in found)


def threads(weights: int) -> int:
    """For work on so many weights."""
    return torch.get_num_threads() if weights >= SHARED_FROM and None not in openmp() else 1


def _check(library: ctypes.CDLL) -> None:
    """Raises:
    Broken: if the kernels do not unpack a small weight as it was packed."""
    from peft_sparse.native.packing import unpack

    bitmask = torch.tensor([[7, 128, 1], [0, 255, 0]], dtype=torch.uint8, device="cpu")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        values = torch.arange(1, 14, dtype=dtype, device="cpu")
        expected = torch.zeros(2, 17, dtype=dtype, device="cpu")
        expected[0, [0, 1, 2, 15, 16]], expected[1, 8:16] = values[:5], values[5:]
        if not torch.equal(unpack(library, values, bitmask, 17), expected):
            raise Broken("were compiled to something that computes wrong results")
