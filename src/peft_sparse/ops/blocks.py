"""What the fused ops share: row blocks that bound their temporaries, and the dtype of their matmuls.

The effective weight of a layer is rebuilt where it is needed and never kept; a block of it has at most BLOCK_ELEMENTS
entries (or one row, or one row group, if that is larger).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 1 << 22


def row_blocks(out_features: int, in_features: int) -> Iterator[slice]:
    """Consecutive slices of rows that cover a weight of shape (out, in)."""
    rows = max(1, BLOCK_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, rows):
        yield slice(start, min(start + rows, out_features))


def group_blocks(out_features: int, in_features: int, num_groups: int) -> Iterator[tuple[slice, slice, int]]:
    """Consecutive (groups, rows, rows per group) that cover a weight with `num_groups` contiguous groups of rows.

    Groups of one block have the same number of rows, so that its weight can be viewed as (groups, rows per group, in).
    The first `out_features % num_groups` groups are one row longer than the others.
    """
    size, longer = divmod(out_features, num_groups)
    for first, last, rows in ((0, longer, size + 1), (longer, num_groups, size)):
        step = max(1, BLOCK_ELEMENTS // max(1, rows * in_features))
        for start in range(first, last, step):
            stop = min(start + step, last)
            offset = start * size + min(start, longer)
            yield slice(start, stop), slice(offset, offset + (stop - start) * rows), rows


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear of `x` is computed: autocast's where it is on, else that of `x`."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def autocast_off(x: torch.Tensor) -> torch.autocast:
    """A context without autocast: a backward may be called inside of one, but chooses its dtypes itself."""
    return torch.autocast(device_type=x.device.type, enabled=False)
