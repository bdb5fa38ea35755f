"""Products with packed weights in C."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_sparse.native.library import PRODUCTS, loaded, openmp, threads


class _Product:
    """Y = X W^T of a packed weight, in float32 whatever the dtype of W. No backward.

    What does not change from call to call is looked up once: a call takes as long as a few hundred weights' product.
    """

    def __init__(self, kernel: str, values: torch.Tensor, places: torch.Tensor, starts: torch.Tensor) -> None:
        tensors = (values, places, starts)
        assert starts.dtype == torch.int64 and all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)
        self._tensors, self._rows = tensors, starts.numel() - 1  # kept, as the kernel knows addresses only
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._kernel = getattr(loaded(), f"{kernel}_{PRODUCTS[values.dtype]}")

    def _run(self, weights: int, *arguments: int, kernel: Callable[..., None] | None = None) -> None:
        (kernel or self._kernel)(*openmp(), threads(weights), *self._addresses, self._rows, *arguments)


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
    _FEW = 4  # tokens; with more, transposing X and reading whole rows of it is faster than gathering from it

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, starts: torch.Tensor, in_features: int) -> None:
        assert in_features <= self.MAX_COLUMNS and bitmask.is_contiguous()
        columns = bitmask.new_zeros(values.numel() + self._PADDING, dtype=torch.int16)  # the bits of unsigned numbers
        loaded().list_columns(bitmask.data_ptr(), *bitmask.shape, columns.data_ptr())
        super().__init__("csr_few", values, columns, starts)
        self._many = getattr(loaded(), f"csr_many_{PRODUCTS[values.dtype]}")
        self._columns, self._lanes, self.nbytes = in_features, loaded().lanes(), columns.nbytes

    def lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row starts, columns (int64, a copy) and values."""
        values, columns, starts = self._tensors
        return starts, columns[: values.numel()].long() & (self.MAX_COLUMNS - 1), values

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
