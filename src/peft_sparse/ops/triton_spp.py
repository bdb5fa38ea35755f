"""SPP's linear in Triton: Y = X W_eff^T + b with W_eff[i, j] = W[i, j] (1 + s B[i] A[g(i), j]) (arXiv 2405.16057).

Two kernels, for what is derived in `peft_sparse.ops.spp_linear`:

- a matmul that builds W_eff tile by tile as it goes, for Y = X W_eff^T + b and for dX = dY W_eff;
- a reduction: a tile of G = dY^T X stays in registers while it is summed over the tokens, becomes H = G * W there, and
  leaves as sums over its rows (by group, for dA) and over its columns (for dB).

A program writes its sums to a place of its own, and PyTorch adds those up: no atomics, so every run gives the same.
W_eff is formed in float32 and rounded to the dtype of X, sums are float32.
"""

import torch
import triton
import triton.language as tl

from peft_sparse.ops import triton_tiles
from peft_sparse.ops.triton_tiles import (
    device_of,
    dot_dtype,
    float32_precision,
    gradient_tile,
    load_tile,
)


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
def _matmul_kernel(
    source_ptr, weight_ptr, a_ptr, b_ptr, bias_ptr, result_ptr,
    tokens, out_features, in_features, longer_rows, group_rows, scaling,
    source_token_stride, source_stride, weight_row_stride, weight_column_stride,
    OFFSET: tl.constexpr, BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X W_eff^T + b, which sums over columns of W; or, BACKWARD, dY W_eff, which sums over its rows."""
    num_features = in_features if BACKWARD else out_features
    depth = out_features if BACKWARD else in_features
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        source = load_tile(
            source_ptr, token[:, None], inner[None, :], source_token_stride, source_stride, tokens, depth
        )
        # the tile of W_eff, (DEPTH, FEATURES)
        rows = inner[:, None] if BACKWARD else feature[None, :]
        columns = feature[None, :] if BACKWARD else inner[:, None]
        weight = load_tile(
            weight_ptr, rows, columns, weight_row_stride, weight_column_stride, out_features, in_features
        ).to(tl.float32)
        inside = (rows < out_features) & (columns < in_features)
        group = _group_of(rows, longer_rows, group_rows)
        a = tl.load(a_ptr + group.to(tl.int64) * in_features + columns, mask=inside, other=0.0)
        b = tl.load(b_ptr + rows, mask=rows < out_features, other=0.0)
        scaled = weight * (scaling * b * a)
        if OFFSET:
            scaled += weight
        total = tl.dot(
            source.to(DOT), scaled.to(source_ptr.dtype.element_ty).to(DOT), total, input_precision=PRECISION
        )
    if HAS_BIAS:
        total += tl.load(bias_ptr + feature, mask=feature < num_features, other=0.0).to(tl.float32)[None, :]
    offsets = token.to(tl.int64)[:, None] * num_features + feature[None, :]
    inside = (token < tokens)[:, None] & (feature < num_features)[None, :]
    tl.store(result_ptr + offsets, total.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(
    x_ptr, dy_ptr, weight_ptr, a_ptr, b_ptr, da_ptr, db_ptr,
    tokens, out_features, in_features, num_groups, longer_rows, group_rows, scaling,
    x_token_stride, x_stride, dy_token_stride, dy_stride, weight_row_stride, weight_column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of H = G * W adds to dA and to dB."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    H = gradient_tile(
        x_ptr, x_token_stride, x_stride, dy_ptr, dy_token_stride, dy_stride, rows, columns, tokens, out_features,
        in_features, ROWS, COLUMNS, TOKENS, DOT, PRECISION,
    )  # fmt: skip
    H *= load_tile(
        weight_ptr, rows[:, None], columns[None, :], weight_row_stride, weight_column_stride, out_features, in_features
    )
    group = _group_of(rows, longer_rows, group_rows)
    a_offsets = group.to(tl.int64)[:, None] * in_features + columns[None, :]
    a = tl.load(a_ptr + a_offsets, mask=(rows < out_features)[:, None] & (columns < in_features)[None, :], other=0.0)
    db = scaling * tl.sum(H * a, axis=1)
    tl.store(db_ptr + column_tile.to(tl.int64) * out_features + rows, db, mask=rows < out_features)
    H *= (scaling * tl.load(b_ptr + rows, mask=rows < out_features, other=0.0))[:, None]
    # groups begin and end where they like: for each that this tile has rows of, the sum over those
    first = _group_of(row_tile * ROWS, longer_rows, group_rows)
    last = _group_of(tl.minimum(row_tile * ROWS + ROWS, out_features) - 1, longer_rows, group_rows)
    for g in range(first, last + 1):
        da = tl.sum(tl.where(group[:, None] == g, H, 0.0), axis=0)
        part = row_tile - _first_row(g, longer_rows, group_rows) // ROWS  # counted from the group's first tile
        da_offset = (part.to(tl.int64) * num_groups + g) * in_features
        tl.store(da_ptr + da_offset + columns, da, mask=columns < in_features)


def _groups(out_features: int, num_groups: int) -> tuple[int, int]:
    """(rows in the groups that are one row longer, rows of one of the others); groups without rows come last."""
    size, longer = divmod(out_features, min(num_groups, out_features))
    return longer * (size + 1), size


def _matmul(
    source: torch.Tensor,  # (..., in), backward (..., out)
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    offset: float,
    backward: bool,
) -> torch.Tensor:
    out_features, in_features = weight.shape
    features = in_features if backward else out_features
    flat = source.reshape(-1, source.shape[-1])
    result = source.new_empty(*source.shape[:-1], features)
    tiles = triton_tiles.MATMUL_TILES[source.element_size()]
    grid = (triton.cdiv(flat.shape[0], tiles.tokens), triton.cdiv(features, tiles.rows))
    with device_of(source):
        _matmul_kernel[grid](
            flat, weight, A.float().contiguous(), B.float().contiguous(),
            result if bias is None else bias.contiguous(), result,
            flat.shape[0], out_features, in_features, *_groups(out_features, A.shape[0]), scaling,
            *flat.stride(), *weight.stride(),
            OFFSET=bool(offset), BACKWARD=backward, HAS_BIAS=bias is not None,
            TOKENS=tiles.tokens, FEATURES=tiles.rows, DEPTH=tiles.columns,
            DOT=dot_dtype(source.dtype), PRECISION=float32_precision(),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return result


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    offset: float,
) -> torch.Tensor:
    """X (W (offset + s B A))^T + b, the offset being 1 or 0; (..., out), new memory."""
    return _matmul(x, weight, bias, A, B, scaling, offset, backward=False)


def input_gradient(
    dy: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, offset: float
) -> torch.Tensor:
    """dX = dY (W (offset + s B A)), (..., in)."""
    return _matmul(dy, weight, None, A, B, scaling, offset, backward=True)


def factor_gradients(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dA, dB) in float32. A group of few rows makes many sums of a tile: right, but not fast."""
    (out_features, in_features), num_groups = weight.shape, A.shape[0]
    x, dy = x.reshape(-1, in_features), dy.reshape(-1, out_features)
    tiles = triton_tiles.REDUCE_TILES[x.element_size()]
    grid = (triton.cdiv(out_features, tiles.rows), triton.cdiv(in_features, tiles.columns))
    longest = -(-out_features // num_groups)
    parts = 1 + (longest - 2 + tiles.rows) // tiles.rows  # the most tiles that a group can have rows in
    dA = A.new_zeros((parts, num_groups, in_features), dtype=torch.float32)
    dB = B.new_empty((grid[1], out_features), dtype=torch.float32)
    with device_of(x):
        _reduce_kernel[grid](
            x, dy, weight, A.float().contiguous(), B.float().contiguous(), dA, dB,
            x.shape[0], out_features, in_features, num_groups, *_groups(out_features, num_groups), scaling,
            *x.stride(), *dy.stride(), *weight.stride(),
            ROWS=tiles.rows, COLUMNS=tiles.columns, TOKENS=tiles.tokens,
            DOT=dot_dtype(x.dtype), PRECISION=float32_precision(),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return dA.sum(0), dB.sum(0)
