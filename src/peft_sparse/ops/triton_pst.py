"""PST's linear in Triton: Y = X (M * W')^T + b with W' = W + beta U V, M given as bits (PST, arXiv 2205.11005).

Two kernels, for what is derived in `peft_sparse.ops.pst_linear`:

- a matmul that builds M * W' tile by tile as it goes, for Y = X (M * W')^T + b and for dX = dY (M * W');
- a reduction: a tile of G = dY^T X stays in registers while it is summed over the tokens, becomes dW' = G * (M + |W'|)
  and dS = G * W' there, and leaves as products with the tile's rows and columns of the factors.

The reduction sees R as one more column of A and C as one more row of B: dS [B^T, 1] is [dA, dR], and [A, 1]^T dS is
[dB; dC]. A program writes its products to a place of its own, and PyTorch adds those up: no atomics, so every run
gives the same. Until then they take (r + score_r + 1) (1 / tile's rows + 1 / tile's columns) float32 numbers a weight,
about half a number at rank 8. W' is formed in float32 and rounded to the dtype of X, sums are float32.
"""

import torch
import triton
import triton.language as tl

from peft_sparse.ops import triton_tiles
from peft_sparse.ops.reference import PstFactors, PstScales
from peft_sparse.ops.triton_tiles import (
    device_of,
    dot_dtype,
    float32_precision,
    gradient_tile,
    load_tile,
    rank_precision,
)


@triton.jit
def _mask_tile(mask_ptr, rows, columns, mask_stride, out_features, in_features):
    """M at `rows` and `columns`, as bool: bit b of byte j of a row is column 8 j + b."""
    bytes_ = load_tile(mask_ptr, rows, columns // 8, mask_stride, 1, out_features, (in_features + 7) // 8)
    return ((bytes_.to(tl.int32) >> (columns % 8)) & 1) != 0


@triton.jit
def _matmul_kernel(
    source_ptr, weight_ptr, mask_ptr, left_ptr, right_ptr, bias_ptr, result_ptr,
    tokens, out_features, in_features, rank, beta,
    source_token_stride, source_stride, weight_row_stride, weight_column_stride, mask_stride,
    left_stride, left_rank_stride, right_rank_stride, right_stride,
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """X (M * W')^T + b, which sums over columns of W'; or, BACKWARD, dY (M * W'), which sums over its rows.

    `left` times `right` is U V in the order in which the tile has it: (V^T, U^T) forward, (U, V) backward.
    """
    num_features = in_features if BACKWARD else out_features
    depth = out_features if BACKWARD else in_features
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    ranks = tl.arange(0, RANK)
    right = load_tile(right_ptr, ranks[:, None], feature[None, :], right_rank_stride, right_stride, rank, num_features)
    total = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        source = load_tile(
            source_ptr, token[:, None], inner[None, :], source_token_stride, source_stride, tokens, depth
        )
        left = load_tile(left_ptr, inner[:, None], ranks[None, :], left_stride, left_rank_stride, depth, rank)
        # the tile of M * W', (DEPTH, FEATURES)
        rows = inner[:, None] if BACKWARD else feature[None, :]
        columns = feature[None, :] if BACKWARD else inner[:, None]
        updated = load_tile(
            weight_ptr, rows, columns, weight_row_stride, weight_column_stride, out_features, in_features
        ).to(tl.float32)
        updated += beta * tl.dot(left, right, input_precision=RANK_PRECISION)
        kept = _mask_tile(mask_ptr, rows, columns, mask_stride, out_features, in_features)
        masked = tl.where(kept, updated, 0.0).to(source_ptr.dtype.element_ty)
        total = tl.dot(source.to(DOT), masked.to(DOT), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + feature, mask=feature < num_features, other=0.0).to(tl.float32)[None, :]
    offsets = token.to(tl.int64)[:, None] * num_features + feature[None, :]
    inside = (token < tokens)[:, None] & (feature < num_features)[None, :]
    tl.store(result_ptr + offsets, total.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_pair(
    gradient, left, right, dleft_ptr, dright_ptr, rows, columns, row_tile, column_tile, out_features, in_features,
    rank, scale, RANK: tl.constexpr, RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of the gradient of (left right) adds to those of left (out, rank) and right (rank, in)."""
    ranks = tl.arange(0, RANK)
    dleft = scale * tl.dot(gradient, tl.trans(right), input_precision=RANK_PRECISION)  # (ROWS, RANK)
    offsets = (column_tile.to(tl.int64) * out_features + rows)[:, None] * rank + ranks[None, :]
    tl.store(dleft_ptr + offsets, dleft, mask=(rows < out_features)[:, None] & (ranks < rank)[None, :])
    dright = scale * tl.dot(tl.trans(left), gradient, input_precision=RANK_PRECISION)  # (RANK, COLUMNS)
    offsets = (row_tile.to(tl.int64) * rank + ranks)[:, None] * in_features + columns[None, :]
    tl.store(dright_ptr + offsets, dright, mask=(ranks < rank)[:, None] & (columns < in_features)[None, :])


@triton.jit
def _reduce_kernel(
    x_ptr, dy_ptr, weight_ptr, mask_ptr, u_ptr, v_ptr, a_ptr, b_ptr, du_ptr, dv_ptr, da_ptr, db_ptr,
    tokens, out_features, in_features, rank, score_rank, beta,
    x_token_stride, x_stride, dy_token_stride, dy_stride, weight_row_stride, weight_column_stride, mask_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of G adds to the gradients of U, V, [A, 1] and [B; 1]; those of the last two not yet scaled."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    G = gradient_tile(
        x_ptr, x_token_stride, x_stride, dy_ptr, dy_token_stride, dy_stride, rows, columns, tokens, out_features,
        in_features, ROWS, COLUMNS, TOKENS, DOT, PRECISION,
    )  # fmt: skip
    ranks, score_ranks = tl.arange(0, RANK), tl.arange(0, SCORE_RANK)
    u = load_tile(u_ptr, rows[:, None], ranks[None, :], rank, 1, out_features, rank)
    v = load_tile(v_ptr, ranks[:, None], columns[None, :], in_features, 1, rank, in_features)
    updated = load_tile(
        weight_ptr, rows[:, None], columns[None, :], weight_row_stride, weight_column_stride, out_features, in_features
    ).to(tl.float32)
    updated += beta * tl.dot(u, v, input_precision=RANK_PRECISION)
    kept = _mask_tile(mask_ptr, rows[:, None], columns[None, :], mask_stride, out_features, in_features)
    dupdated = G * (tl.where(kept, 1.0, 0.0) + tl.abs(updated))
    _reduce_pair(
        dupdated, u, v, du_ptr, dv_ptr, rows, columns, row_tile, column_tile, out_features, in_features, rank, beta,
        RANK, RANK_PRECISION,
    )  # fmt: skip
    a = load_tile(a_ptr, rows[:, None], score_ranks[None, :], score_rank, 1, out_features, score_rank)
    b = load_tile(b_ptr, score_ranks[:, None], columns[None, :], in_features, 1, score_rank, in_features)
    _reduce_pair(
        G * updated, a, b, da_ptr, db_ptr, rows, columns, row_tile, column_tile, out_features, in_features, score_rank,
        1.0, SCORE_RANK, RANK_PRECISION,
    )  # fmt: skip


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _matmul(
    source: torch.Tensor,  # (..., in), backward (..., out)
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor,
    left: torch.Tensor,  # (depth, r) float32
    right: torch.Tensor,  # (r, features) float32
    beta: float,
    backward: bool,
) -> torch.Tensor:
    out_features, in_features = weight.shape
    features = in_features if backward else out_features
    flat, packed_mask = source.reshape(-1, source.shape[-1]), packed_mask.contiguous()
    result = source.new_empty(*source.shape[:-1], features)
    tiles = triton_tiles.MATMUL_TILES[source.element_size()]
    grid = (triton.cdiv(flat.shape[0], tiles.tokens), triton.cdiv(features, tiles.rows))
    with device_of(source):
        _matmul_kernel[grid](
            flat, weight, packed_mask, left, right, result if bias is None else bias.contiguous(), result,
            flat.shape[0], out_features, in_features, left.shape[1], beta,
            *flat.stride(), *weight.stride(), packed_mask.stride(0), *left.stride(), *right.stride(),
            BACKWARD=backward, HAS_BIAS=bias is not None,
            TOKENS=tiles.tokens, FEATURES=tiles.rows, DEPTH=tiles.columns, RANK=_padded(left.shape[1]),
            DOT=dot_dtype(source.dtype), PRECISION=float32_precision(), RANK_PRECISION=rank_precision(source.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return result


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor,
    factors: PstFactors,
    beta: float,
) -> torch.Tensor:
    """X (M * (W + beta U V))^T + b; (..., out), new memory."""
    U, V = (getattr(factors, name).float() for name in "UV")
    return _matmul(x, weight, bias, packed_mask, V.T, U.T, beta, backward=False)


def input_gradient(
    dy: torch.Tensor, weight: torch.Tensor, packed_mask: torch.Tensor, factors: PstFactors, beta: float
) -> torch.Tensor:
    """dX = dY (M * (W + beta U V)), (..., in)."""
    U, V = (getattr(factors, name).float() for name in "UV")
    return _matmul(dy, weight, None, packed_mask, U, V, beta, backward=True)


def factor_gradients(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    packed_mask: torch.Tensor,
    factors: PstFactors,
    scales: PstScales,
) -> PstFactors:
    """The gradients of U, V, A, B, R and C, in float32."""
    U, V, A, B, R, C = (getattr(factors, name).float() for name in "UVABRC")
    A1, B1 = torch.cat([A, torch.ones_like(R)[:, None]], 1), torch.cat([B, torch.ones_like(C)[None]])
    (out_features, in_features), rank, score_rank = weight.shape, U.shape[1], A1.shape[1]
    x, dy, packed_mask = x.reshape(-1, in_features), dy.reshape(-1, out_features), packed_mask.contiguous()
    tiles = triton_tiles.REDUCE_TILES[x.element_size()]
    grid = (triton.cdiv(out_features, tiles.rows), triton.cdiv(in_features, tiles.columns))
    dU, dA1 = (U.new_empty((grid[1], out_features, width)) for width in (rank, score_rank))
    dV, dB1 = (V.new_empty((grid[0], width, in_features)) for width in (rank, score_rank))
    with device_of(x):
        _reduce_kernel[grid](
            x, dy, weight, packed_mask, U.contiguous(), V.contiguous(), A1, B1, dU, dV, dA1, dB1,
            x.shape[0], out_features, in_features, rank, score_rank, scales.beta,
            *x.stride(), *dy.stride(), *weight.stride(), packed_mask.stride(0),
            ROWS=tiles.rows, COLUMNS=tiles.columns, TOKENS=tiles.tokens,
            RANK=_padded(rank), SCORE_RANK=_padded(score_rank),
            DOT=dot_dtype(x.dtype), PRECISION=float32_precision(), RANK_PRECISION=rank_precision(x.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    left, right = dA1.sum(0), dB1.sum(0)
    return PstFactors(
        U=dU.sum(0), V=dV.sum(0),
        A=scales.alpha1 * left[:, :-1], B=scales.alpha1 * right[:-1],
        R=scales.alpha2 * left[:, -1], C=scales.alpha2 * right[-1],
    )  # fmt: skip
