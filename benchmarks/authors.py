"""The authors' formulations of SPP and PST as modules, re-expressed from the formulas of the papers, not from code.

They differ from ours in how they compute, not in what: autograd sees every product.

    SPP (arXiv 2405.16057):  Y = X W^T + b + s X (W * Repeat(B, in) * Repeat(A, out / r))^T,
        the update formed as an (out, in) tensor from A repeated over the rows of each group; optionally under
        torch's checkpoint, which forms it again in the backward instead of keeping it.
    PST (arXiv 2205.11005):  Y = X (M * W')^T + b,  W' = W + beta U V,
        S = |W'| + alpha1 A B + alpha2 (R + C), M from a full argsort of S in every forward, straight-through.

`check.py` compares both with `peft_sparse.ops.reference`, forward and backward, before anything is timed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class AuthorsSpp(nn.Module):
    """SPP's linear. out_features must be divisible by `r`, as in the authors' code.

    Args:
        linear: the frozen, pruned layer.
        r: number of row groups.
        scaling: s.
        checkpointed: recompute the update in the backward.
    """

    def __init__(self, linear: nn.Linear, r: int = 16, scaling: float = 2.0, checkpointed: bool = False) -> None:
        super().__init__()
        if linear.out_features % r:
            raise ValueError(f"The authors' SPP needs out_features divisible by {r}, got {linear.out_features}.")
        self.linear, self.scaling, self.checkpointed = linear, scaling, checkpointed
        self.A = nn.Parameter(torch.empty(r, linear.in_features, device=linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, 1, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        A = self.A.repeat_interleave(weight.shape[0] // self.A.shape[0], dim=0)  # (out, in)
        return self.scaling * F.linear(x, (weight * self.B * A).to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = checkpoint(self.update, x, use_reentrant=False) if self.checkpointed else self.update(x)
        return self.linear(x) + update


class _MaskByArgsort(torch.autograd.Function):
    """The mask of all but the smallest scores; its gradient goes to the scores as it is."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, num_pruned: int) -> torch.Tensor:
        mask = torch.ones_like(scores)
        mask.view(-1)[scores.reshape(-1).argsort()[:num_pruned]] = 0
        return mask

    @staticmethod
    def backward(ctx: Any, dmask: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dmask, None


class AuthorsPst(nn.Module):
    """PST's linear.

    Args:
        linear: the frozen layer.
        r, score_r: ranks of U V and of A B.
        sparsity: share of zeros, the same in every step.
        scales: beta, alpha1, alpha2.
    """

    def __init__(
        self,
        linear: nn.Linear,
        r: int = 8,
        score_r: int = 8,
        sparsity: float = 0.5,
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.linear, self.scales = linear, scales
        self.num_pruned = int(sparsity * linear.weight.numel())
        out, columns, device = linear.out_features, linear.in_features, linear.weight.device
        self.U = nn.Parameter(torch.randn(out, r, device=device))
        self.V = nn.Parameter(torch.zeros(r, columns, device=device))
        self.A = nn.Parameter(torch.randn(out, score_r, device=device))
        self.B = nn.Parameter(torch.zeros(score_r, columns, device=device))
        self.R = nn.Parameter(torch.zeros(out, device=device))
        self.C = nn.Parameter(torch.zeros(columns, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beta, alpha1, alpha2 = self.scales
        updated = self.linear.weight + beta * (self.U @ self.V)  # (out, in)
        scores = updated.abs() + alpha1 * (self.A @ self.B) + alpha2 * (self.R[:, None] + self.C[None, :])
        mask = _MaskByArgsort.apply(scores, self.num_pruned)
        return F.linear(x, (mask * updated).to(x.dtype), self.linear.bias)
