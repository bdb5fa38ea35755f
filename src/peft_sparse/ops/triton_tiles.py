"""What the Triton kernels share: sizes of tiles, precision of products, loading a tile.

Imported only when the kernels are used: it needs triton, 3.0 or later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """Sizes of the tiles of one program, and how it is run. Powers of two of at least 16, as `tl.dot` wants them."""

    tokens: int
    rows: int  # of the result; in a reduction, rows of the weight
    columns: int
    warps: int
    stages: int


# Chosen by what fits in registers and shared memory (a test compiles the kernels), not by timing.
# A matmul: `rows` features of the result, in steps of `columns` along the features that are summed over.
# A reduction: a tile of G, in steps of `tokens`.
MATMUL_TILES = {2: Tiles(128, 128, 32, warps=8, stages=3), 4: Tiles(64, 64, 16, warps=8, stages=2)}
REDUCE_TILES = {2: Tiles(32, 64, 64, warps=8, stages=3), 4: Tiles(32, 64, 64, warps=8, stages=2)}
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """The elements at `rows` and `columns`, two index tensors that broadcast to a tile; 0 outside of the matrix."""
    offsets = rows.to(tl.int64) * row_stride + columns.to(tl.int64) * column_stride
    return tl.load(pointer + offsets, mask=(rows < num_rows) & (columns < num_columns), other=0)


@triton.jit
def gradient_tile(
    x_ptr, x_token_stride, x_stride, dy_ptr, dy_token_stride, dy_stride, rows, columns, tokens, out_features,
    in_features, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of G = dY^T X, summed over all tokens in float32."""
    G = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        dy = load_tile(dy_ptr, rows[:, None], token[None, :], dy_stride, dy_token_stride, out_features, tokens)
        x = load_tile(x_ptr, token[:, None], columns[None, :], x_token_stride, x_stride, tokens, in_features)
        G = tl.dot(dy.to(DOT), x.to(DOT), G, input_precision=PRECISION)
    return G


# Whether the kernels run in Triton's interpreter: decided once, by TRITON_INTERPRET when they are made.
INTERPRETED = not isinstance(load_tile, triton.JITFunction)


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype of a dot's operands, after they were rounded to `dtype`.

    The interpreter multiplies the bits of bfloat16 operands as if they were integers, and gets them as float32.
    """
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TL_DTYPES[dtype]


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
