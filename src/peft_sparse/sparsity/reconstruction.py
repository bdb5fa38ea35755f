"""Reconstruction: weights are pruned column by column, and the columns that follow make up for it (SparseGPT, arXiv
2301.00774).

With the Hessian of a layer's output error, H = 2 X^T X / n over its inputs, and H^-1 = U^T U with U upper triangular,
SparseGPT goes through the input columns j from left to right (algorithm 1):

    e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk for all k > j,   score of a weight: (w_j / U_jj)^2

where q_j is w_j with its pruned weights zeroed. The same with no inverse of H: let H = R R^T with R upper triangular,
so that U = R^-1, and let D = W - Q be the changes of all columns J that are done. The columns K of the next block are
then

    W_K + D_J R_JK U_KK,   U_KK = R_KK^-1,

so that one Cholesky factorisation and inverses of small blocks do, what a block gets from all columns before it is one
matrix product, and columns go one by one only inside a panel of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peft_sparse.sparsity.importance import score_dtype
from peft_sparse.sparsity.masks import select_mask
from peft_sparse.sparsity.patterns import NM, Pattern, Unstructured

# Columns whose masks are chosen together, as in the paper.
BLOCK_SIZE = 128
# Columns that go one by one; from the columns before the panel they get a matrix product.
PANEL_SIZE = 16


class InputFactor(NamedTuple):
    """What pruning needs to know of a layer's inputs; layers with the same inputs share it.

    Attributes:
        carry: (in, in). For block K of columns and the columns J before it, R_JK U_KK; in the block itself
            U_jk / U_jj. What lies below the blocks of the diagonal has no meaning.
        diagonal: (in,), R_jj, which is 1 / U_jj.
        dead: bool (in,), inputs that are zero in every token.
        block_size: columns of a block.
    """

    carry: torch.Tensor
    diagonal: torch.Tensor
    dead: torch.Tensor
    block_size: int


def fit_block_size(pattern: Pattern, block_size: int = BLOCK_SIZE) -> int:
    """The largest number of columns up to `block_size` that holds whole groups of an N:M pattern, at least one."""
    return max(pattern.m, block_size // pattern.m * pattern.m) if isinstance(pattern, NM) else block_size


def factorize_(
    hessian: torch.Tensor, diagonal: torch.Tensor, damping: float, block_size: int = BLOCK_SIZE
) -> InputFactor | None:
    """Factorise a damped Hessian in its own memory, the largest thing that a layer takes.

    A dead input gets 1 on the diagonal; then the whole diagonal gets `damping` times its mean on top, as in the
    authors' code.

    Args:
        hessian: (in, in) float32 or float64. Only what is below the diagonal is read, and it stays: after None, call
            again with more damping. The rest is written.
        diagonal: (in,), of the Hessian.
        damping: relative to the mean of the diagonal, at least 0.
        block_size: see [`fit_block_size`].

    Returns:
        The factor, whose `carry` is `hessian`; None if the damped Hessian is not positive definite in its precision.
    """
    dead = diagonal == 0
    damped = diagonal.masked_fill(dead, 1.0)
    damped += damping * damped.mean()
    blocks = [slice(start, min(start + block_size, len(diagonal))) for start in range(0, len(diagonal), block_size)]
    for block in blocks:
        hessian[block, block.stop :] = hessian[block.stop :, block].T
        corner = hessian[block, block]
        below = corner.tril(-1)
        corner.copy_(below + below.T)  # symmetric, and its lower part as it was
    hessian.diagonal().copy_(damped)
    corners: dict[int, torch.Tensor] = {}
    failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
    for block in reversed(blocks):
        start, stop = block.start, block.stop
        above = hessian[:start, block]
        above.addmm_(hessian[:start, stop:], hessian[block, stop:].T, alpha=-1)
        corner = hessian[block, block].addmm(hessian[block, stop:], hessian[block, stop:].T, alpha=-1)
        # From the last row to the first one: the usual factorisation of the corner turned around.
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        failed |= info
        corners[start] = corner = lower.flip(0, 1)
        above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
    if bool(failed):
        return None
    factor = torch.cat([corners[block.start].diagonal() for block in blocks])
    for block in blocks:
        corner = corners[block.start]
        identity = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        hessian[: block.start, block] = hessian[: block.start, block] @ inverse
        hessian[block, block] = inverse * corner.diagonal()[:, None]
    return InputFactor(hessian, factor, dead, block_size)


def prune_and_reconstruct(
    weight: torch.Tensor, factor: InputFactor, pattern: Pattern, sparsity: float, match_authors: bool = False
) -> torch.Tensor:
    """Prune a weight by SparseGPT and move what stays.

    An unstructured pattern chooses its mask when a block of columns is reached: among all weights of the block for
    group "layer", as in the paper, within each row of it for group "row". What is pruned up to the end of a block is
    the count that the pattern has for so many columns, so that the layer (or each row) has exactly its count. An N:M
    pattern chooses when the first column of a group is reached. Weights of dead inputs score 0.

    Args:
        weight: (out, in), any floating dtype.
        factor: of the inputs, from [`factorize_`], with blocks that hold whole groups of the pattern.
        pattern: N:M needs an `in` divisible by M.
        sparsity: share of zeros, as the pattern resolved it.
        match_authors: prune an unstructured pattern as the authors' code does: its comparison with the threshold
            (`<=`) takes one weight more in each block, and more where weights tie. All weights of dead inputs become
            zero, in any pattern.

    Returns:
        (out, in), float32, or float64 for such a weight; what is pruned is 0.

    Examples:
        >>> weight, hessian = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> factor = factorize_(hessian, hessian.diagonal().clone(), damping=0.0)
        >>> prune_and_reconstruct(weight, factor, Unstructured(), 0.5)
        tensor([[0.0000, 2.5000]])
    """
    dtype = score_dtype(weight.dtype)
    carry, diagonal = factor.carry.to(dtype), factor.diagonal.to(dtype).masked_fill(factor.dead, 0.0)[:, None]
    # (in, out), so that a column of the weight is one run of memory. W at first, D in the blocks that are done.
    changes = weight.detach().T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if match_authors:
        changes[factor.dead] = 0
    result = torch.empty_like(changes)
    for start in range(0, len(changes), factor.block_size):
        block = slice(start, start + factor.block_size)
        current = torch.addmm(changes[block], carry[:start, block].T, changes[:start], out=result[block])
        pruned = None
        if isinstance(pattern, Unstructured):
            scores = (current * diagonal[block]).square_()
            pruned = _choose_in_block(scores, pattern, sparsity, start, match_authors)
        _go_through_block(current, carry[block, block], diagonal[block], pruned, pattern)
        changes[block] -= current
    return result.T


def _choose_in_block(
    scores: torch.Tensor, pattern: Unstructured, sparsity: float, start: int, match_authors: bool
) -> torch.Tensor:
    """Which weights of a block go, bool (columns, out), by `scores` of that shape; its first column is `start`."""
    columns, rows = scores.shape
    if match_authors:
        rank = pattern.num_pruned(sparsity, scores.numel()) + 1
        return scores <= scores.view(-1).kthvalue(rank).values
    before = pattern.num_pruned(sparsity, pattern.group_size((rows, start)))
    after = pattern.num_pruned(sparsity, pattern.group_size((rows, start + columns)))
    if pattern.group == "row":
        return ~select_mask(scores.T, after - before, columns).T
    return ~select_mask(scores, after - before, scores.numel())


def _go_through_block(
    current: torch.Tensor, carry: torch.Tensor, diagonal: torch.Tensor, pruned: torch.Tensor | None, pattern: Pattern
) -> None:
    """Prune the columns of a block one after the other, in place.

    Args:
        current: (columns, out), with all that the columns before the block have passed on.
        carry: (columns, columns), U_jk / U_jj.
        diagonal: (columns, 1), of the factor.
        pruned: bool (columns, out); None: an N:M pattern chooses as it goes.
        pattern: N:M gives the size of its groups.
    """
    columns = len(current)
    group = pattern.m if isinstance(pattern, NM) else PANEL_SIZE
    panel = max(group, PANEL_SIZE // group * group)
    goes = torch.empty_like(current) if pruned is None else pruned.to(current.dtype)
    lost = torch.empty_like(current)  # w_j where it is pruned, 0 elsewhere: e_j U_jj
    for first in range(0, columns, panel):
        last = min(first + panel, columns)
        current[first:last].addmm_(carry[:first, first:last].T, lost[:first], alpha=-1)
        for start in range(first, last, group):
            stop = min(start + group, last)
            if isinstance(pattern, NM):
                current[start:stop].addmm_(carry[first:start, start:stop].T, lost[first:start], alpha=-1)
                scores = (current[start:stop] * diagonal[start:stop]).square_()
                goes[start:stop] = ~select_mask(scores.T, pattern.m - pattern.n, pattern.m).T
            for k in range(start, stop):
                if k > start:
                    current[k].addmv_(lost[start:k].T, carry[start:k, k], alpha=-1)
                torch.mul(current[k], goes[k], out=lost[k])
        current[first:last] -= lost[first:last]
