"""SPP's linear with Triton: Y = X W_eff^T + b with W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]) (arXiv 2405.16057).

Matmuls are PyTorch's, which no kernel of ours is as fast as. The work around them, for what is derived in
`peft_sparse.ops.spp_linear`, is two kernels that read the weight once each:

- W_eff of a block of rows, for Y = X W_eff^T + b and for dX = dY W_eff;
- from G = dY^T X of a block of rows: H = G * W, tile by tile, leaves as sums over its rows (by group, for dA) and over
  its columns (for dB).

A program writes its sums to a place of its own, and PyTorch adds those up: no atomics, so every run gives the same.
W_eff is formed in float32 and rounded to the dtype of X, sums are float32. The rows of a packed W are unpacked first.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from peft_sparse.ops import triton_tiles
from peft_sparse.ops.blocks import Buffers, add_product, autocast_off, linear_by_blocks, row_blocks, weight_rows
from peft_sparse.ops.triton_tiles import device_of, load_tile, store_tile
from peft_sparse.sparsity import Weight


@triton.jit
def _group_of(rows, longer_rows, group_rows):
    """g(i): the rows before `longer_rows` are in groups of one row more than the others."""
    return tl.where(
        rows < longer_rows,
        rows // (group_rows + 1),
        longer_rows // (group_rows + 1) + (rows - longer_rows) // group_rows,
    )


@triton.jit
def _first_row(group, longer_rows, group_rows):
    """The inverse: the first row of a group."""
    return group * group_rows + tl.minimum(group, longer_rows // (group_rows + 1))


@triton.jit
def _effective_kernel(
    weight_ptr, a_ptr, b_ptr, result_ptr,
    first, out_features, in_features, longer_rows, group_rows, scaling,
    weight_row_stride, weight_column_stride,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of W (offset + s B A). `first` is the row of W that is the first one of the block; `out_features` and
    pointers count from there, but that of A."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    weight = load_tile(
        weight_ptr, rows, columns, weight_row_stride, weight_column_stride, out_features, in_features
    ).to(tl.float32)
    group = _group_of(first + rows, longer_rows, group_rows)
    inside = (rows < out_features) & (columns < in_features)
    a = tl.load(a_ptr + group.to(tl.int64) * in_features + columns, mask=inside, other=0.0)
    b = tl.load(b_ptr + rows, mask=rows < out_features, other=0.0)
    scaled = weight * (scaling * b * a)
    if OFFSET:
        scaled += weight
    store_tile(result_ptr, scaled, rows, columns, in_features, out_features, in_features)


@triton.jit
def _reduce_kernel(
    gradient_ptr, weight_ptr, a_ptr, b_ptr, da_ptr, db_ptr,
    first, out_features, in_features, num_groups, longer_rows, group_rows, scaling,
    weight_row_stride, weight_column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What one tile of H = G * W adds to dA and to dB; rows are counted as in `_effective_kernel`."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    H = load_tile(gradient_ptr, rows[:, None], columns[None, :], in_features, 1, out_features, in_features).to(
        tl.float32
    )
    H *= load_tile(
        weight_ptr, rows[:, None], columns[None, :], weight_row_stride, weight_column_stride, out_features, in_features
    )
    group = _group_of(first + rows, longer_rows, group_rows)
    a_offsets = group.to(tl.int64)[:, None] * in_features + columns[None, :]
    a = tl.load(a_ptr + a_offsets, mask=(rows < out_features)[:, None] & (columns < in_features)[None, :], other=0.0)
    db = scaling * tl.sum(H * a, axis=1)
    tl.store(db_ptr + column_tile.to(tl.int64) * out_features + rows, db, mask=rows < out_features)
    H *= (scaling * tl.load(b_ptr + rows, mask=rows < out_features, other=0.0))[:, None]
    # groups begin and end where they like: for each that this tile has rows of, the sum over those
    top = _group_of(first + row_tile * ROWS, longer_rows, group_rows)
    last = _group_of(first + tl.minimum(row_tile * ROWS + ROWS, out_features) - 1, longer_rows, group_rows)
    for g in range(top, last + 1):
        da = tl.sum(tl.where(group[:, None] == g, H, 0.0), axis=0)
        begin = tl.maximum(_first_row(g, longer_rows, group_rows) - first, 0)
        part = row_tile - begin // ROWS  # counted from the group's first tile in this block
        da_offset = (part.to(tl.int64) * num_groups + g) * in_features
        tl.store(da_ptr + da_offset + columns, da, mask=columns < in_features)


def _groups(out_features: int, num_groups: int) -> tuple[int, int]:
    """(rows in the groups that are one row longer, rows of one of the others); groups without rows come last."""
    size, longer = divmod(out_features, min(num_groups, out_features))
    return longer * (size + 1), size


def _effective_rows(
    weight: Weight,  # (out, in)
    A: torch.Tensor,  # (r, in), float32 and contiguous
    B: torch.Tensor,  # (out,), float32 and contiguous
    scaling: float,
    offset: float,
    dtype: torch.dtype,
    rows: slice,
) -> torch.Tensor:
    """W (offset + s B A) of some rows, (rows, in)."""
    block, (out_features, in_features) = weight_rows(weight, rows, Buffers(A)), weight.shape
    result = torch.empty(block.shape, dtype=dtype, device=A.device)
    tile = triton_tiles.ELEMENTWISE_TILE
    grid = (triton.cdiv(block.shape[0], tile.rows), triton.cdiv(in_features, tile.columns))
    _effective_kernel[grid](
        block, A, B[rows], result,
        rows.start, block.shape[0], in_features, *_groups(out_features, A.shape[0]), scaling, *block.stride(),
        OFFSET=bool(offset), ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return result


def _factor_gradients(
    gradient: torch.Tensor,  # G of some rows, (rows, in)
    weight: Weight,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    rows: slice,
    into: torch.Tensor,  # (rows,)
) -> torch.Tensor:
    """What some rows add to dA, (r, in); their dB is written. A group of few rows makes many sums of a tile: right,
    but not fast."""
    block, (out_features, in_features), num_groups = weight_rows(weight, rows, Buffers(A)), weight.shape, A.shape[0]
    tile = triton_tiles.REDUCE_TILE
    grid = (triton.cdiv(block.shape[0], tile.rows), triton.cdiv(in_features, tile.columns))
    longest = -(-out_features // num_groups)
    parts = 1 + (longest - 2 + tile.rows) // tile.rows  # the most tiles that a group can have rows in
    dA, dB = A.new_zeros((parts, num_groups, in_features)), B.new_empty((grid[1], block.shape[0]))
    _reduce_kernel[grid](
        gradient, block, A, B[rows], dA, dB,
        rows.start, block.shape[0], in_features, num_groups, *_groups(out_features, num_groups), scaling,
        *block.stride(), ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    torch.sum(dB, 0, out=into)
    return dA.sum(0)


def forward(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    offset: float,
) -> torch.Tensor:
    """X (W (offset + s B A))^T + b, the offset being 1 or 0; (..., out), new memory."""
    A, B = A.float().contiguous(), B.float().contiguous()
    blocks = (
        (rows, partial(_effective_rows, weight, A, B, scaling, offset, x.dtype, rows))
        for rows in row_blocks(x, *weight.shape)
    )
    with device_of(x), autocast_off(x):
        return linear_by_blocks(x, bias, weight.shape[0], blocks)


def gradients(
    x: torch.Tensor,  # (tokens, in)
    dy: torch.Tensor,  # (tokens, out)
    weight: Weight,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    offset: float,
    needs_x: bool,
    needs_factors: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dX, dA, dB), the last two in float32; None for what is not needed."""
    A, B = A.float().contiguous(), B.float().contiguous()
    dx = dA = None
    dB = torch.empty_like(B)
    with device_of(x), autocast_off(x):
        for rows in row_blocks(x, *weight.shape):
            if needs_x:
                dx = add_product(dx, dy[:, rows], _effective_rows(weight, A, B, scaling, offset, x.dtype, rows))
            if needs_factors:
                G = dy[:, rows].T @ x
                of_rows = _factor_gradients(G, weight, A, B, scaling, rows, into=dB[rows])
                dA = of_rows if dA is None else dA.add_(of_rows)
    return dx, dA, dB if needs_factors else None
