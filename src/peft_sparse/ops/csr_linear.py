"""The linear of a weight of which only the non-zeros are listed, forward alone: Y = X W^T + b on a CPU.

A matrix times a vector reads every weight once, so that with few of them left it takes a fraction of the dense time;
with many tokens the dense product is bound by arithmetic, at which it is far better. The C kernels of
`peft_sparse.native` do it where there are some, with columns in 16 bits; else MKL, through torch's sparse tensors, in
one of three ways, each the fastest for its number of tokens:

- one token: y = W x + b;
- up to `FEW` tokens: Y^T = W X^T with X and Y as they lie, a dot product for each row and token;
- more: X^T and Y^T are laid out anew, so that a non-zero is multiplied with consecutive numbers, in chunks of `CHUNK`
  tokens, which stay in a core's cache.
"""

from __future__ import annotations

import torch

from peft_sparse.native import PRODUCTS, NativeCsr, native_in_use
from peft_sparse.ops import reference
from peft_sparse.sparsity import PackedWeight, Weight, csr_tensor, dense_weight

FEW = 4
CHUNK = 64


class CsrLinear:
    """The fast form of [`peft_sparse.ops.reference.csr_linear`] for one weight, made ready once: same results up to
    the order of sums.

    Where W is zero an infinity or a NaN in X does not reach Y, as it does in a dense product. Not differentiable.

    Args:
        weight: (out, in), on a CPU, in a dtype that [`CsrLinear.refusal`] has nothing against. A packed one shares its
            values.

    Attributes:
        values: (nnz,), the non-zeros.
        nbytes: of what is held beside the weight.
    """

    def __init__(self, weight: Weight) -> None:
        packed = weight if isinstance(weight, PackedWeight) else PackedWeight.of(dense_weight(weight).detach())
        self.values = packed.values.detach().contiguous()
        self._native: NativeCsr | None = None
        self._csr: torch.Tensor | None = None
        if _is_native(packed.dtype, packed.in_features):
            starts = packed.starts.long()
            self._native = NativeCsr(self.values, packed.bitmask.contiguous(), starts, packed.in_features)
            self.nbytes = self._native.nbytes + starts.nbytes
        else:
            self._csr = csr_tensor(packed)
            self.nbytes = self._csr.crow_indices().nbytes + self._csr.col_indices().nbytes
        self.nbytes += 0 if packed is weight else packed.values.nbytes
        self._dtype, self._in_features = packed.dtype, packed.in_features

    @staticmethod
    def refusal(dtype: torch.dtype, in_features: int) -> str | None:
        """Why weights of this dtype and number of columns cannot be computed so on this CPU; None if they can."""
        if _is_native(dtype, in_features):
            return None
        if dtype not in (torch.float32, torch.float64):
            return f"computes in float32 or float64 without native kernels, not in {str(dtype).removeprefix('torch.')}"
        return None if torch.backends.mkl.is_available() else "needs native kernels, or a torch with MKL"

    def takes(self, x: torch.Tensor) -> bool:
        """Whether this computes `x`, (..., in)."""
        fits = x.dtype == self._dtype and x.device.type == "cpu" and x.shape[-1] == self._in_features
        return fits and (self._native is None or (x.numel() > 0 and native_in_use()))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Y, (..., out), of the dtype of `x`, of which [`CsrLinear.takes`] was asked; `bias` is (out,) or None."""
        if self._native is None:
            assert self._csr is not None
            return csr_linear(x, self._csr, bias)
        if reference.reference_in_use():
            return reference.csr_linear(x, self._native.csr_tensor(), bias)
        y = self._native(x)
        y = y if bias is None else y.add_(bias)
        return y if y.dtype == x.dtype else y.to(x.dtype)


def _is_native(dtype: torch.dtype, in_features: int) -> bool:
    return dtype in PRODUCTS and in_features <= NativeCsr.MAX_COLUMNS and native_in_use()


def csr_linear(x: torch.Tensor, csr: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[`peft_sparse.ops.reference.csr_linear`] by MKL: same arguments, same results up to the order of sums."""
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
