"""The C kernels as functions of tensors, and their switch."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch

from peft_sparse.native.build import Unavailable, load_library

VARIABLE = "PEFT_SPARSE_NATIVE"
PRODUCTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SHARED_FROM = 1 << 15  # weights: to wake other threads takes longer than to do less alone
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_UNPACKED = {2: "unpack_16", 4: "unpack_32", 8: "unpack_64"}

_RUNTIME = (c_void_p, c_void_p, c_void_p, c_int)  # `_openmp` and `_threads`
_WEIGHT = (c_void_p, c_void_p, c_void_p, c_int64, c_int64)  # values, bitmask or columns, starts, and two sizes
_SIGNATURES = {
    "row_starts": (c_void_p, c_int64, c_int64, c_void_p),
    **dict.fromkeys(_UNPACKED.values(), (*_RUNTIME, *_WEIGHT, c_void_p)),
    "list_columns": (c_void_p, c_int64, c_int64, c_void_p),
    **{
        f"{kernel}_{dtype}": (*_RUNTIME, *_WEIGHT, c_int64, c_void_p, c_void_p)
        for kernel in ("bitmask", "csr_few", "csr_many")
        for dtype in PRODUCTS.values()
    },
}


class use_native:
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

    def __init__(self, enabled: bool = True) -> None:
        self._before = use_native._enabled
        use_native._enabled = enabled

    def __enter__(self) -> use_native:
        return self

    def __exit__(self, *_: object) -> None:
        use_native._enabled = self._before


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
        if "compiled" in _reason:  # there is a compiler, so that one would expect them to work
            warnings.warn(f"peft_sparse's native kernels {_reason}; PyTorch computes the same.", stacklevel=2)
        return None
    return library


@functools.cache
def _openmp() -> tuple[int | None, ...]:
    """The entry points of the OpenMP runtime that torch has loaded; all None if they are not to be found."""
    process = ctypes.CDLL(None)
    try:
        found = [getattr(process, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except AttributeError:
        return (None,) * 3
    return tuple(ctypes.cast(function, c_void_p).value for function in found)


def _threads(weights: int) -> int:
    """For work on so many weights."""
    return torch.get_num_threads() if weights >= SHARED_FROM and None not in _openmp() else 1


def native_takes(bitmask: torch.Tensor, values: torch.Tensor | None = None) -> bool:
    """Whether the kernels take this bitmask, and unpack these values: on a CPU, outside of compiled graphs, and where
    autograd does not record. The first call compiles them."""
    for tensor in (bitmask, values):
        if tensor is not None and (tensor.device.type != "cpu" or type(tensor) not in _PLAIN_TENSORS):
            return False
    if values is not None and (values.element_size() not in _UNPACKED or _records(values)):
        return False
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and native_in_use()


def _records(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def native_row_starts(bitmask: torch.Tensor) -> torch.Tensor:
    """[`peft_sparse.sparsity.row_starts`] of uint8 (out, bytes), as int64."""
    return _row_starts(_loaded(), bitmask)


def _row_starts(library: Any, bitmask: torch.Tensor) -> torch.Tensor:
    bitmask, (rows, row_bytes) = bitmask.contiguous(), bitmask.shape
    starts = torch.empty(rows + 1, dtype=torch.int64)
    library.row_starts(bitmask.data_ptr(), rows, row_bytes, starts.data_ptr())
    return starts


def native_unpack(
    values: torch.Tensor, bitmask: torch.Tensor, in_features: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[`peft_sparse.sparsity.unpack_values`], bit for bit.

    Raises:
        ValueError: unless each bit that is set has a value."""
    return _unpack(_loaded(), values, bitmask, in_features, out)


def _unpack(
    library: Any, values: torch.Tensor, bitmask: torch.Tensor, in_features: int, out: torch.Tensor | None
) -> torch.Tensor:
    values, bitmask, rows = values.detach().contiguous(), bitmask.contiguous(), bitmask.shape[0]
    starts = _row_starts(library, bitmask)
    bits = int(starts[-1])
    if bits != values.numel() or bitmask.shape[1] != (in_features + 7) // 8:
        raise ValueError(
            f"Each bit of a bitmask that is set has a value, got {bits} bits and {values.numel()} values of a weight "
            f"with {in_features} columns and a bitmask of {tuple(bitmask.shape)}; pack the weight again."
        )
    out = values.new_empty(rows, in_features) if out is None else out
    assert out.shape == (rows, in_features) and out.dtype == values.dtype and out.is_contiguous()
    getattr(library, _UNPACKED[values.element_size()])(
        *_openmp(), _threads(out.numel()),
        values.data_ptr(), bitmask.data_ptr(), starts.data_ptr(), rows, in_features, out.data_ptr(),
    )  # fmt: skip
    return out


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "native_in_use() was not asked"
    return library


class _Product:
    """Y = X W^T of a packed weight, in float32 whatever the dtype of W. No backward.

    What does not change from call to call is looked up once: a call takes as long as a few hundred weights' product.
    """

    def __init__(self, kernel: str, values: torch.Tensor, places: torch.Tensor, starts: torch.Tensor) -> None:
        tensors = (values, places, starts)
        assert starts.dtype == torch.int64 and all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)
        self._tensors, self._rows = tensors, starts.numel() - 1  # kept, as the kernel knows addresses only
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._kernel = getattr(_loaded(), f"{kernel}_{PRODUCTS[values.dtype]}")

    def _run(self, weights: int, *arguments: int, kernel: Callable[..., None] | None = None) -> None:
        (kernel or self._kernel)(*_openmp(), _threads(weights), *self._addresses, self._rows, *arguments)


class NativeBitmask(_Product):
    """Y = X W^T of values and bitmask, which are read as they lie.

    Args:
        values: (nnz,), float32, bfloat16 or float16.
        bitmask: uint8 (out, ceil(in / 8)); the bits after the last column are 0.
        starts: int64 (out + 1,), see [`peft_sparse.sparsity.row_starts`].
        in_features: columns of the weight. All three tensors are contiguous, on a CPU, and fit each other.
    """

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, in_features: int) -> None:
        super().__init__("bitmask", values, bitmask, starts)
        self._columns = in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """From (..., in), of any floating dtype, to float32 (..., out)."""
        x, rows, columns = _as_float32(x), self._rows, self._columns
        y = x.new_empty((*x.shape[:-1], rows))
        self._run(rows * columns, columns, x.numel() // columns, x.data_ptr(), y.data_ptr())
        return y


class NativeCsr(_Product):
    """Y = X W^T of values and the column of each in 16 bits, which are made from the bitmask: [`NativeBitmask`]'s
    arguments and results. Faster than that where few values are left, since what it does for a zero is nothing.

    Attributes:
        nbytes: of the columns.
    """

    MAX_COLUMNS = 1 << 16
    _PADDING = 16  # columns are loaded so many at a time
    _FEW = 4  # tokens, from which on transposing X and reading it by rows is faster than gathering from it

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, in_features: int) -> None:
        assert in_features <= self.MAX_COLUMNS and bitmask.is_contiguous()
        columns = torch.zeros(values.numel() + self._PADDING, dtype=torch.int16)  # the bits of unsigned numbers
        _loaded().list_columns(bitmask.data_ptr(), *bitmask.shape, columns.data_ptr())
        super().__init__("csr_few", values, columns, starts)
        self._many = getattr(_loaded(), f"csr_many_{PRODUCTS[values.dtype]}")
        self._columns, self._lanes, self.nbytes = in_features, _loaded().lanes(), columns.nbytes

    def csr_tensor(self) -> torch.Tensor:
        """The weight (out, in) as torch's own sparse tensor, a copy."""
        values, columns, starts = self._tensors
        columns = columns[: values.numel()].int() & (self.MAX_COLUMNS - 1)
        return torch.sparse_csr_tensor(starts, columns.long(), values, (self._rows, self._columns))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """From (..., in), of any floating dtype, to float32 (..., out)."""
        x, columns = _as_float32(x), self._columns
        y, tokens = x.new_empty((*x.shape[:-1], self._rows)), x.numel() // columns
        if tokens <= self._FEW:
            self._run(self._rows * columns, columns, tokens, x.data_ptr(), y.data_ptr())
            return y
        width = -(-tokens // self._lanes) * self._lanes
        transposed = x.new_zeros(columns, width)
        transposed[:, :tokens] = x.view(tokens, columns).T
        self._run(self._rows * columns, width, tokens, transposed.data_ptr(), y.data_ptr(), kernel=self._many)
        return y


def _as_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def _check(library: Any) -> None:
    """Raises:
    Unavailable: if the kernels do not unpack a small weight as it was packed."""
    bitmask = torch.tensor([[7, 128, 1], [0, 255, 0]], dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        values = torch.arange(1, 14, dtype=dtype)
        expected = torch.zeros(2, 17, dtype=dtype)
        expected[0, [0, 1, 2, 15, 16]], expected[1, 8:16] = values[:5], values[5:]
        if not torch.equal(_unpack(library, values, bitmask, 17, None), expected):
            raise Unavailable("were compiled to something that computes wrong results")
