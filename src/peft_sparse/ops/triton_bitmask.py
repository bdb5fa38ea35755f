"""The linear of a packed weight for one token, in Triton: y = W x + b, W as values and bitmask (sparsity/packing.py).

Decoding text reads every weight once per token, so that its time on a GPU is that of reading them: n of N weights in
bfloat16 are 2 n + N / 8 bytes instead of 2 N. A program has some rows of W. It goes over their columns from left to
right; a running count of the bits says which value belongs to a place, so that the values are read in order and once,
and places without one are not read at all. Sums are float32.
"""

import torch
import triton
import triton.language as tl

from peft_sparse.ops.triton_tiles import device_of
from peft_sparse.sparsity import PackedWeight

# Chosen like the tiles of the other kernels, by what fits, not by timing.
ROWS, COLUMNS, WARPS = 4, 512, 4


@triton.jit
def _vector_kernel(
    x_ptr, values_ptr, bitmask_ptr, starts_ptr, bias_ptr, y_ptr,
    out_features, in_features, row_bytes, x_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some elements of y, one for each of the program's rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    before = tl.load(starts_ptr + rows, mask=inside, other=0).to(tl.int64)  # values of the places to the left
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, in_features, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        exists = columns < in_features
        offsets = rows.to(tl.int64)[:, None] * row_bytes + (columns // 8)[None, :]
        packed = tl.load(bitmask_ptr + offsets, mask=inside[:, None] & exists[None, :], other=0).to(tl.int32)
        bits = (packed >> (columns % 8)[None, :]) & 1  # (ROWS, COLUMNS)
        place = before[:, None] + tl.cumsum(bits, axis=1) - 1
        values = tl.load(values_ptr + place, mask=bits == 1, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + columns * x_stride, mask=exists, other=0.0).to(tl.float32)
        # not a product with 0: there 0 * infinity would be NaN
        total += tl.sum(tl.where(bits == 1, values * x[None, :], 0.0), axis=1)
        before += tl.sum(bits, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows, total.to(y_ptr.dtype.element_ty), mask=inside)


def forward(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """W x + b of one token.

    Args:
        x: (..., in) with one token.
        weight: with all of its tensors, `starts` too, on the device of `x`.
        bias: (out,) or None.

    Returns:
        (..., out), of the dtype of `x`.
    """
    out_features, in_features = weight.shape
    vector = x.reshape(-1)
    y = x.new_empty(*x.shape[:-1], out_features)
    with device_of(x):
        _vector_kernel[(triton.cdiv(out_features, ROWS),)](
            vector, weight.values, weight.bitmask.contiguous(), weight.starts,
            y if bias is None else bias.contiguous(), y,
            out_features, in_features, weight.bitmask.shape[1], vector.stride(0),
            HAS_BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return y
