"""SPP's effective weight of a packed weight: V_eff = V (1 + s B[i] A[g(i), j]) at the places (i, j) of the values V.

Zeros stay zeros, so the effective weight has the same places and is packed too. This is what merging writes, and what
a second active adapter starts from. With G the gradient of the effective weight and H = G * W, as in `spp_linear.py`:

    dV = G (1 + s B A);    dA[g] = s sum over i in g of B[i] H[i];    dB[i] = s <H[i], A[g(i)]>.

Built block of rows by block, so that nothing of the dense weight's size exists at any time. The plain twin is
`spp_weight` in `peft_sparse.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_sparse.ops import reference
from peft_sparse.ops.blocks import autocast_off, group_blocks
from peft_sparse.ops.derivatives import first_only
from peft_sparse.ops.spp_block import factor_gradients, scaled_rows
from peft_sparse.sparsity import PackedWeight, Weight, unpack_values, write_rows
from peft_sparse.sparsity.importance import score_dtype


def spp_weight(weight: Weight, A: torch.Tensor, B: torch.Tensor, scaling: float) -> Weight:
    """[`peft_sparse.ops.reference.spp_weight`], packed if `weight` is.

    Returns:
        At least float32; of the same form as `weight`, and with the same bitmask if it is packed.
    """
    plain = torch.compiler.is_compiling() or reference.reference_in_use()  # a compiler gets the weight as one block
    if plain or not isinstance(weight, PackedWeight):
        return reference.spp_weight(weight, A, B, scaling)
    return weight._replace(values=_SppValues.apply(weight.values, A, B, scaling, *weight[1:]))


class _SppValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,  # (nnz,)
        A: torch.Tensor,  # (r, in)
        B: torch.Tensor,  # (out,)
        scaling: float,
        *packing: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, A, B)
        ctx.scaling, ctx.packing = scaling, packing
        weight = PackedWeight(values, *packing)
        dtype = score_dtype(values.dtype)
        A, B = A.to(dtype), B.to(dtype)
        effective = torch.empty_like(values, dtype=dtype)
        for groups, rows, size in group_blocks(A, weight.shape[0], weight.in_features, A.shape[0]):
            block = scaled_rows(weight.rows(rows), A[groups], B[rows], size, scaling, 1.0, dtype)
            write_rows(effective, weight, rows, block)
        return effective

    @staticmethod
    @first_only
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, A, B = ctx.saved_tensors
        needs_values, needs_A, needs_B = ctx.needs_input_grad[:3]
        weight = PackedWeight(values, *ctx.packing)
        dtype, scaling = score_dtype(values.dtype), ctx.scaling
        A_wide, B_wide = A.to(dtype), B.to(dtype)
        dA, dB = torch.zeros_like(A_wide), torch.zeros_like(B_wide)
        own = torch.empty_like(values) if needs_values else None
        with autocast_off(values):
            for groups, rows, size in group_blocks(A_wide, weight.shape[0], weight.in_features, A.shape[0]):
                A_block, B_block, span = A_wide[groups], B_wide[rows], weight.span(rows)
                G = unpack_values(dvalues[span], weight.bitmask[rows], weight.in_features)  # (rows, in)
                if own is not None:
                    write_rows(own, weight, rows, scaled_rows(G, A_block, B_block, size, scaling, 1.0, own.dtype))
                H = G.mul_(weight.rows(rows)).view(A_block.shape[0], size, -1)  # (groups, rows per group, in)
                dA_block, dB[rows] = factor_gradients(H, A_block, B_block, scaling)
                dA[groups] += dA_block
        gradients = own, dA.to(A.dtype) if needs_A else None, dB.to(B.dtype) if needs_B else None
        return *gradients, *[None] * (1 + len(ctx.packing))
