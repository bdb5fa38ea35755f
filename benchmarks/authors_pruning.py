"""Wanda and SparseGPT as their authors publish them, re-expressed from the papers' formulas: an object for each layer
takes in batches of inputs, and then prunes it.

They differ from ours in how they compute, not in what:

    Wanda (arXiv 2306.11695): a running mean of the squared norms of the input columns; a stable sort of every row, or
        topk over one group of M columns after the other.
    SparseGPT (arXiv 2301.00774): a running mean of 2 X X^T; the factor of the Hessian's inverse by two Cholesky
        factorisations and an inverse; in blocks of 128 columns, one column after the other, whose error is passed on
        to the rest of the block at once, and at the end of the block to all columns after it. The threshold comes from
        a full sort of a block's scores.

`check_pruning.py` compares both with ours, and with the authors' numbers where `shared/` is beside the repository,
before anything is timed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

BLOCK_SIZE, DAMPING = 128, 0.01


class AuthorsWanda:
    """Wanda for one linear.

    Args:
        linear: pruned in place.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.num_sequences = linear, 0
        self.squares = torch.zeros(linear.in_features, device=linear.weight.device)

    def add_batch(self, x: torch.Tensor) -> None:
        """Take in (sequences, tokens, in)."""
        sequences, columns = x.shape[0], x.reshape(-1, x.shape[-1]).t().float()
        self.squares *= self.num_sequences / (self.num_sequences + sequences)
        self.num_sequences += sequences
        self.squares += columns.norm(p=2, dim=1) ** 2 / self.num_sequences

    def prune(self, sparsity: float, nm: tuple[int, int] | None) -> None:
        """Zero `sparsity` of every row, or all but N of every M weights."""
        weight = self.linear.weight.data
        scores = weight.abs() * self.squares.reshape(1, -1).sqrt()
        gone = torch.zeros_like(scores, dtype=torch.bool)
        if nm is None:
            order = scores.sort(dim=-1, stable=True)[1]
            gone.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], True)
        else:
            n, m = nm
            for first in range(0, weight.shape[1], m):
                lowest = scores[:, first : first + m].float().topk(m - n, dim=1, largest=False)[1]
                gone.scatter_(1, first + lowest, True)
        weight[gone] = 0


class AuthorsSparseGpt:
    """SparseGPT for one linear.

    Args:
        linear: pruned in place.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.num_sequences = linear, 0
        self.hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def add_batch(self, x: torch.Tensor) -> None:
        """Take in (sequences, tokens, in)."""
        sequences, columns = x.shape[0], x.reshape(-1, x.shape[-1]).t()
        self.hessian *= self.num_sequences / (self.num_sequences + sequences)
        self.num_sequences += sequences
        columns = math.sqrt(2 / self.num_sequences) * columns.float()
        self.hessian += columns.matmul(columns.t())

    def prune(self, sparsity: float, nm: tuple[int, int] | None) -> None:
        """Zero `sparsity` of the layer and one weight more in every block, or all but N of every M weights."""
        weight, hessian = self.linear.weight.data.clone().float(), self.hessian
        del self.hessian
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        hessian = torch.linalg.cholesky(hessian)
        hessian = torch.cholesky_inverse(hessian)
        U = torch.linalg.cholesky(hessian, upper=True)
        for first in range(0, weight.shape[1], BLOCK_SIZE):
            last = min(first + BLOCK_SIZE, weight.shape[1])
            weight[:, first:last], errors = self._prune_block(
                weight[:, first:last].clone(), U[first:last, first:last], sparsity, nm
            )
            weight[:, last:] -= errors.matmul(U[first:last, last:])
        self.linear.weight.data = weight.to(self.linear.weight.dtype)

    @staticmethod
    def _prune_block(
        block: torch.Tensor, U: torch.Tensor, sparsity: float, nm: tuple[int, int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pruned, errors, losses = torch.zeros_like(block), torch.zeros_like(block), torch.zeros_like(block)
        gone = torch.zeros_like(block, dtype=torch.bool)
        if nm is None:
            scores = block**2 / U.diagonal().reshape(1, -1) ** 2
            gone = scores <= scores.flatten().sort()[0][int(scores.numel() * sparsity)]
        for j in range(block.shape[1]):
            column, scale = block[:, j], U[j, j]
            if nm is not None and j % nm[1] == 0:
                n, m = nm
                scores = block[:, j : j + m] ** 2 / U.diagonal()[j : j + m].reshape(1, -1) ** 2
                gone.scatter_(1, j + scores.topk(m - n, dim=1, largest=False)[1], True)
            stays = column.clone()
            stays[gone[:, j]] = 0
            pruned[:, j] = stays
            losses[:, j] = (column - stays) ** 2 / scale**2
            error = (column - stays) / scale
            block[:, j:] -= error.unsqueeze(1).matmul(U[j, j:].unsqueeze(0))
            errors[:, j] = error
        return pruned, errors
