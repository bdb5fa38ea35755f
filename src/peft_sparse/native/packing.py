"""Packing and unpacking in C, as functions of tensors."""

from __future__ import annotations

from typing import Any

import torch

from peft_sparse._graphs import values_unknown
from peft_sparse.native.library import BITS, loaded, native_in_use, openmp, threads

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def native_takes(bitmask: torch.Tensor, values: torch.Tensor | None = None) -> bool:
    """Whether the kernels take this bitmask, and unpack these values: on a CPU, outside of recorded graphs, and where
    autograd does not record. The first call compiles them."""
    for tensor in (bitmask, values):
        if tensor is not None and (tensor.device.type != "cpu" or type(tensor) not in _PLAIN_TENSORS):
            return False
    if values is not None and (values.element_size() not in BITS or _records(values)):
        return False
    return not values_unknown() and not torch._C._are_functorch_transforms_active() and native_in_use()


def _records(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def native_row_starts(bitmask: torch.Tensor) -> torch.Tensor:
    """[`peft_sparse.sparsity.row_starts`] of uint8 (out, bytes), as int64."""
    return _row_starts(loaded(), bitmask)


def _row_starts(library: Any, bitmask: torch.Tensor) -> torch.Tensor:
    bitmask, (rows, row_bytes) = bitmask.contiguous(), bitmask.shape
    starts = torch.empty(rows + 1, dtype=torch.int64, device="cpu")
    library.row_starts(bitmask.data_ptr(), rows, row_bytes, starts.data_ptr())
    return starts


def native_unpack(
    values: torch.Tensor, bitmask: torch.Tensor, in_features: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[`peft_sparse.sparsity.unpack_values`], bit for bit.

    Raises:
        ValueError: unless each bit that is set has a value."""
    return unpack(loaded(), values, bitmask, in_features, out)


def unpack(
    library: Any, values: torch.Tensor, bitmask: torch.Tensor, in_features: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[`native_unpack`] by a library that is not in use yet."""
    values, bitmask, rows = values.detach().contiguous(), bitmask.contiguous(), bitmask.shape[0]
    starts = _row_starts(library, bitmask)
    bits = int(starts[-1])
    if bits != values.numel() or bitmask.shape[1] != (in_features + 7) // 8:
        raise ValueError(
            f"Each bit of a bitmask that is set has a value, got {bits} bits and {values.numel()} values of a weight "
            f"with {in_features} columns and a bitmask of {tuple(bitmask.shape)}; pack the weight again."
        )
    out = values.new_empty(rows, in_features) if out is None else out
    assert out.shape == (rows, in_features) and out.dtype == values.dtype and out.is_contiguous()
    getattr(library, f"unpack_{BITS[values.element_size()]}")(
        *openmp(), threads(out.numel()),
        values.data_ptr(), bitmask.data_ptr(), starts.data_ptr(), rows, in_features, out.data_ptr(),
    )  # fmt: skip
    return out


def native_nonzeros(weight: torch.Tensor) -> torch.Tensor:
    """The packed mask of what is not zero, uint8 (out, ceil(in / 8)), see [`peft_sparse.sparsity.pack_mask`].

    Args:
        weight: (out, in), of a floating dtype.
    """
    weight, (rows, columns) = weight.detach().contiguous(), weight.shape
    bitmask = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8, device="cpu")
    getattr(loaded(), f"mark_{BITS[weight.element_size()]}")(
        *openmp(), threads(weight.numel()), weight.data_ptr(), rows, columns, bitmask.data_ptr()
    )
    return bitmask


def native_pack(weight: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """[`peft_sparse.sparsity.pack_values`], bit for bit.

    Raises:
        ValueError: if the bitmask is none of a weight of this shape."""
    weight, bitmask, (rows, columns) = weight.detach().contiguous(), bitmask.contiguous(), weight.shape
    if tuple(bitmask.shape) != (rows, (columns + 7) // 8):
        raise ValueError(
            f"A bitmask is (out, ceil(in / 8)), got {tuple(bitmask.shape)} for a weight of {(rows, columns)}; make it "
            "with `pack_mask`."
        )
    starts = _row_starts(loaded(), bitmask)
    values = weight.new_empty(int(starts[-1]))
    getattr(loaded(), f"pack_{BITS[weight.element_size()]}")(
        *openmp(), threads(weight.numel()),
        values.data_ptr(), bitmask.data_ptr(), starts.data_ptr(), rows, columns, weight.data_ptr(),
    )  # fmt: skip
    return values
