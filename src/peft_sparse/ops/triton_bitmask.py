"""The linear of a packed weight for one token, in Triton: y = W x + b, W as values and bitmask (sparsity/packing.py).

Decoding text reads every weight once per token, so that its time on a GPU is at least that of reading them: n of N
weights in bfloat16 are 2 n + N / 8 bytes instead of 2 N. A program has some rows of W and goes over the bytes of their
bitmask from left to right. A running sum over the bits that are set in each byte says where the values of its eight
places begin; these are gone through one by one, each for all bytes at once, so that values are read in order and once,
and places without one are not read at all. Sums are float32.
"""

import torch
import triton
import triton.language as tl

from peft_sparse.ops.triton_tiles import device_of
from peft_sparse.sparsity import PackedWeight

ROWS, BYTES, WARPS = 1, 128, 4  # the fastest of sixteen choices on an H200, at four sizes and two sparsities


@triton.jit
def _bits_set(byte):
    """How many bits of each byte are set, the bytes being int32: sums of neighbours, of pairs, of fours."""
    byte -= (byte >> 1) & 0x55
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def _vector_kernel(
    x_ptr, values_ptr, bitmask_ptr, starts_ptr, bias_ptr, y_ptr,
    out_features, in_features, row_bytes,
    HAS_BIAS: tl.constexpr, WHOLE_BYTES: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Some elements of y, one for each of the program's rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < out_features
    row_values = values_ptr + tl.load(starts_ptr + rows, mask=inside, other=0)
    row_bits = bitmask_ptr + rows.to(tl.int64) * row_bytes
    before = tl.zeros((ROWS,), dtype=tl.int32)  # values of the places to the left
    total = tl.zeros((ROWS, BYTES), dtype=tl.float32)
    for start in range(0, row_bytes, BYTES):
        byte = start + tl.arange(0, BYTES)
        exists = inside[:, None] & (byte < row_bytes)[None, :]
        bits = tl.load(row_bits[:, None] + byte[None, :], mask=exists, other=0).to(tl.int32)
        count = _bits_set(bits)
        place = before[:, None] + tl.cumsum(count, axis=1) - count
        for bit in tl.static_range(8):
            values = tl.load(row_values[:, None] + place, mask=(bits & (1 << bit)) != 0, other=0.0)
            column = byte * 8 + bit
            # the bits of places beyond the last column are zero, but their x must not be read
            x = tl.load(x_ptr + column, mask=byte < row_bytes if WHOLE_BYTES else column < in_features, other=0.0)
            total += values.to(tl.float32) * x.to(tl.float32)[None, :]
            place += (bits >> bit) & 1
        before += tl.sum(count, axis=1)
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    vector = x.reshape(-1).contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    with device_of(x):
        _vector_kernel[(triton.cdiv(out_features, ROWS),)](
            vector, weight.values, weight.bitmask.contiguous(), weight.starts,
            y if bias is None else bias.contiguous(), y,
            out_features, in_features, weight.bitmask.shape[1],
            HAS_BIAS=bias is not None, WHOLE_BYTES=in_features % 8 == 0, ROWS=ROWS, BYTES=BYTES, num_warps=WARPS,
        )  # fmt: skip
    return y
