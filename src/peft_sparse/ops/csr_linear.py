"""The linear of a weight of which only the non-zeros are listed, forward alone: Y = X W^T + b on a CPU.

A matrix times a vector reads every weight once, so that with few of them left it takes a fraction of the dense time;
with many tokens the dense product is bound by arithmetic, at which it is far better. Three ways, each the fastest for
its number of tokens:

- one token: y = W x + b;
- up to `FEW` tokens: Y^T = W X^T with X and Y as they lie, a dot product for each row and token;
- more: X^T and Y^T are laid out anew, so that a non-zero is multiplied with consecutive numbers, in chunks of `CHUNK`
  tokens, which stay in a core's cache.
"""

from __future__ import annotations

import torch

from peft_sparse.ops import reference

FEW = 4
CHUNK = 64


def csr_linear(x: torch.Tensor, csr: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The fast form of [`peft_sparse.ops.reference.csr_linear`]: same arguments, same results up to the order of sums.

    Where W is zero an infinity or a NaN in X does not reach Y, as it does in a dense product. Not differentiable.
    """
    if reference.reference_in_use():
        return reference.csr_linear(x, csr, bias)
    *batch, in_features = x.shape
    if x.numel() == in_features:
        vector = x.reshape(-1)
        y = torch.mv(csr, vector) if bias is None else torch.addmv(bias, csr, vector)
        return y.view(*batch, -1)
    out_features = csr.shape[0]
    y = x.new_empty(*x.shape[:-1], out_features)
    tokens = x.reshape(-1, in_features)
    count = tokens.shape[0]
    rows = y.view(-1, out_features)
    if count <= FEW:
        torch.mm(csr, tokens.T, out=rows.T)
    else:
        for start in range(0, count, CHUNK):
            part = tokens[start : start + CHUNK]
            rows[start : start + CHUNK] = torch.mm(csr, part.T.contiguous()).T
    return y if bias is None else y.add_(bias)
