"""What the Triton kernels share: sizes of tiles, precision of products, loading and storing a tile.

Imported only when the kernels are used: it needs triton, 3.0 or later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """The part of a weight that one program works on, and its warps. Powers of two of at least 16, as `tl.dot` wants
    them."""

    rows: int
    columns: int
    warps: int


# Elementwise kernels take what few threads hold in registers. In a reduction every tile leaves sums behind, fewer of
# them the larger it is.
ELEMENTWISE_TILE = Tile(16, 128, warps=4)
REDUCE_TILE = Tile(32, 64, warps=4)


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """The elements at `rows` and `columns`, two index tensors that broadcast to a tile; 0 outside of the matrix."""
    offsets = rows.to(tl.int64) * row_stride + columns.to(tl.int64) * column_stride
    return tl.load(pointer + offsets, mask=(rows < num_rows) & (columns < num_columns), other=0)


@triton.jit
def store_tile(pointer, value, rows, columns, row_stride, num_rows, num_columns):
    """The counterpart, for a matrix whose rows are contiguous; rounded to its dtype."""
    offsets = rows.to(tl.int64) * row_stride + columns
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=(rows < num_rows) & (columns < num_columns))


# Whether the kernels run in Triton's interpreter: decided once, by TRITON_INTERPRET when they are made.
INTERPRETED = not isinstance(load_tile, triton.JITFunction)


def float32_precision() -> str:
    """How a float32 product may be rounded: as PyTorch is told to do it in its own matmuls."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 brought `fp32_precision`; from then on reading `allow_tf32` fails where a user has set the new one
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def rank_precision(dtype: torch.dtype) -> str:
    """Of the products with PST's low-rank factors, which are float32 whatever the dtype of X.

    Beside an X in half precision each is three products on tensor cores, which keep about 21 bits, instead of one
    float32 product that runs without them.
    """
    return float32_precision() if dtype == torch.float32 else "tf32x3"


@contextmanager
def device_of(x: torch.Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of `x`."""
    if x.device.type != "cuda":
        yield
        return
    with torch.cuda.device(x.device):
        yield
