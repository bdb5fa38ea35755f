"""PST's linear with Triton: Y = X (M * W')^T + b with W' = W + beta U V, M given as bits (PST, arXiv 2205.11005).

Matmuls with X are PyTorch's, which no kernel of ours is as fast as. The work around them, for what is derived in
`peft_sparse.ops.pst_linear`, is two kernels that read the weight once each:

- M * W' of a block of rows, for Y = X (M * W')^T + b and for dX = dY (M * W');
- from G = dY^T X of a block of rows: dW' = G * (M + |W'|) and dS = G * W', tile by tile, leave as products with the
  tile's rows and columns of the factors.

The reduction sees R as one more column of A and C as one more row of B: dS [B^T, 1] is [dA, dR], and [A, 1]^T dS is
[dB; dC]. A program writes its products to a place of its own, and PyTorch adds those up: no atomics, so every run
gives the same. Until then they take (r + score_r + 1) (1 / tile's rows + 1 / tile's columns) float32 numbers a weight,
about half a number at rank 8. W' is formed in float32 and rounded to the dtype of X, sums are float32.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from peft_sparse.ops import triton_tiles
from peft_sparse.ops.blocks import add_product, autocast_off, linear_by_blocks, row_blocks
from peft_sparse.ops.reference import PstFactors, PstScales
from peft_sparse.ops.triton_tiles import device_of, load_tile, rank_precision, store_tile


@triton.jit
def _mask_tile(mask_ptr, rows, columns, mask_stride, out_features, in_features):
    """M at `rows` and `columns`, as bool: bit b of byte j of a row is column 8 j + b."""
    bytes_ = load_tile(mask_ptr, rows, columns // 8, mask_stride, 1, out_features, (in_features + 7) // 8)
    return ((bytes_.to(tl.int32) >> (columns % 8)) & 1) != 0


@triton.jit
def _masked_kernel(
    weight_ptr, mask_ptr, u_ptr, v_ptr, result_ptr,
    out_features, in_features, rank, beta, weight_row_stride, weight_column_stride, mask_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of M * W'. The product U V is short: it is summed rank by rank, without rounding."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    u_at, v_at = u_ptr + rows.to(tl.int64) * rank, v_ptr + columns
    update = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(rank):
        u = tl.load(u_at, mask=rows < out_features, other=0.0)
        v = tl.load(v_at, mask=columns < in_features, other=0.0)
        update += u[:, None] * v[None, :]
        u_at += 1
        v_at += in_features
    rows, columns = rows[:, None], columns[None, :]
    weight = load_tile(
        weight_ptr, rows, columns, weight_row_stride, weight_column_stride, out_features, in_features
    ).to(tl.float32)
    kept = _mask_tile(mask_ptr, rows, columns, mask_stride, out_features, in_features)
    masked = tl.where(kept, weight + beta * update, 0.0)
    store_tile(result_ptr, masked, rows, columns, in_features, out_features, in_features)


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
    gradient_ptr, weight_ptr, mask_ptr, u_ptr, v_ptr, a_ptr, b_ptr, du_ptr, dv_ptr, da_ptr, db_ptr,
    out_features, in_features, rank, score_rank, beta, weight_row_stride, weight_column_stride, mask_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, SCORE_RANK: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of G adds to the gradients of U, V, [A, 1] and [B; 1]; those of the last two not yet scaled."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    G = load_tile(gradient_ptr, rows[:, None], columns[None, :], in_features, 1, out_features, in_features).to(
        tl.float32
    )
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


def _masked_rows(
    weight: torch.Tensor,  # (out, in)
    packed_mask: torch.Tensor,  # (out, ceil(in / 8)), contiguous
    U: torch.Tensor,  # (out, r), float32 and contiguous
    V: torch.Tensor,  # (r, in), float32 and contiguous
    beta: float,
    dtype: torch.dtype,
    rows: slice,
) -> torch.Tensor:
    """M * W' of some rows, (rows, in)."""
    block = weight[rows]
    result, tile = torch.empty(block.shape, dtype=dtype, device=weight.device), triton_tiles.ELEMENTWISE_TILE
    grid = (triton.cdiv(block.shape[0], tile.rows), triton.cdiv(block.shape[1], tile.columns))
    _masked_kernel[grid](
        block, packed_mask[rows], U[rows], V, result, *block.shape, V.shape[0], beta, *block.stride(),
        packed_mask.stride(0), ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return result


def _factor_gradients(
    gradient: torch.Tensor,  # G of some rows, (rows, in)
    weight: torch.Tensor,
    packed_mask: torch.Tensor,
    factors: Sequence[torch.Tensor],  # U, V, [A, 1], [B; 1], float32 and contiguous
    beta: float,
    precision: str,
    rows: slice,
    into: tuple[torch.Tensor, torch.Tensor],  # (rows, r), (rows, score_r + 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """What some rows add to the gradients of V and of [B; 1]; theirs of U and of [A, 1] are written."""
    U, V, A1, B1 = factors
    block, rank, score_rank, tile = weight[rows], U.shape[1], A1.shape[1], triton_tiles.REDUCE_TILE
    grid = (triton.cdiv(block.shape[0], tile.rows), triton.cdiv(block.shape[1], tile.columns))
    dU, dA1 = (U.new_empty((grid[1], block.shape[0], width)) for width in (rank, score_rank))
    dV, dB1 = (V.new_empty((grid[0], width, block.shape[1])) for width in (rank, score_rank))
    _reduce_kernel[grid](
        gradient, block, packed_mask[rows], U[rows], V, A1[rows], B1, dU, dV, dA1, dB1,
        *block.shape, rank, score_rank, beta, *block.stride(), packed_mask.stride(0),
        ROWS=tile.rows, COLUMNS=tile.columns, RANK=_padded(rank), SCORE_RANK=_padded(score_rank),
        RANK_PRECISION=precision, num_warps=tile.warps,
    )  # fmt: skip
    torch.sum(dU, 0, out=into[0])
    torch.sum(dA1, 0, out=into[1])
    return dV.sum(0), dB1.sum(0)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor,
    factors: PstFactors,
    beta: float,
) -> torch.Tensor:
    """X (M * (W + beta U V))^T + b; (..., out), new memory."""
    U, V = (getattr(factors, name).float().contiguous() for name in "UV")
    packed_mask = packed_mask.contiguous()
    blocks = (
        (rows, partial(_masked_rows, weight, packed_mask, U, V, beta, x.dtype, rows))
        for rows in row_blocks(x, *weight.shape)
    )
    with device_of(x), autocast_off(x):
        return linear_by_blocks(x, bias, weight.shape[0], blocks)


def gradients(
    x: torch.Tensor,  # (tokens, in)
    dy: torch.Tensor,  # (tokens, out)
    weight: torch.Tensor,
    packed_mask: torch.Tensor,
    factors: PstFactors,
    scales: PstScales,
    needs_x: bool,
    needs_factors: bool,
) -> tuple[torch.Tensor | None, PstFactors | None]:
    """dX and those of U, V, A, B, R and C, in float32; None for what is not needed."""
    U, V, A, B, R, C = (getattr(factors, name).float().contiguous() for name in "UVABRC")
    A1, B1 = torch.cat([A, torch.ones_like(R)[:, None]], 1), torch.cat([B, torch.ones_like(C)[None]])
    packed_mask, precision = packed_mask.contiguous(), rank_precision(x.dtype)
    dx = dV = dB1 = None
    dU, dA1 = torch.empty_like(U), torch.empty_like(A1)
    with device_of(x), autocast_off(x):
        for rows in row_blocks(x, *weight.shape):
            if needs_x:
                W = _masked_rows(weight, packed_mask, U, V, scales.beta, x.dtype, rows)
                dx = add_product(dx, dy[:, rows], W)
                del W  # so that G can have its memory
            if needs_factors:
                G, into = dy[:, rows].T @ x, (dU[rows], dA1[rows])
                of_rows = _factor_gradients(G, weight, packed_mask, (U, V, A1, B1), scales.beta, precision, rows, into)
                if dV is None or dB1 is None:
                    dV, dB1 = of_rows
                else:
                    dV += of_rows[0]
                    dB1 += of_rows[1]
    if dV is None or dB1 is None:
        return dx, None
    return dx, PstFactors(
        U=dU, V=dV,
        A=scales.alpha1 * dA1[:, :-1], B=scales.alpha1 * dB1[:-1],
        R=scales.alpha2 * dA1[:, -1], C=scales.alpha2 * dB1[-1],
    )  # fmt: skip
