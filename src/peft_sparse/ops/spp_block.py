"""One block of rows of SPP's effective weight, and what it adds to the gradients of the factors.

The blocks are those of [`peft_sparse.ops.blocks.group_blocks`]: whole row groups of equal size, or a part of one.
`spp_linear.py` has the equations.
"""

from __future__ import annotations

import torch


def scaled_rows(
    weight: torch.Tensor,  # (rows of the block, in)
    A: torch.Tensor,  # (groups, in)
    B: torch.Tensor,  # (rows of the block,)
    rows_per_group: int,
    scaling: float,
    offset: float,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W (offset + s B A) of one block, rounded to `dtype`; the offset is 1 or 0. In `out` unless rounded."""
    B, A = (scaling * B).view(-1, rows_per_group, 1), A[:, None, :]
    if out is not None:
        out = out.view(A.shape[0], rows_per_group, A.shape[-1])
    scaled = torch.mul(B, A, out=out)  # (groups, rows per group, in)
    grouped = weight.to(scaled.dtype).reshape(scaled.shape)
    scaled = torch.addcmul(grouped, grouped, scaled, out=out) if offset else scaled.mul_(grouped)
    return scaled.view(weight.shape).to(dtype)


def factor_gradients(
    H: torch.Tensor,  # (groups, rows per group, in)
    A: torch.Tensor,  # (groups, in)
    B: torch.Tensor,  # (rows of the block,)
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA (groups, in) and dB (rows of the block,) of one block, given H = G * W."""
    groups, rows_per_group, _ = H.shape
    dA = scaling * (B.view(groups, 1, rows_per_group) @ H).squeeze(1)
    dB = scaling * (A[:, None, :] @ H.mT).reshape(-1)
    return dA, dB
