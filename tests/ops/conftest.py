"""What the tests of the Triton kernels share. Whether kernels run on a GPU or under Triton's interpreter is decided by
the environment before they are made, so without a GPU those tests run in a process of their own, with
`TRITON_INTERPRET=1`: from `make test-triton`, or from test_triton_interpreted.py."""

import os
from collections.abc import Iterator

import pytest
import torch

from peft_sparse import ops

SMALL = 16  # the smallest tile that there is: odd sizes then need several, the last one in part


@pytest.fixture(params=["small tiles", "tiles"])
def use_triton(request, monkeypatch) -> Iterator[torch.device]:
    """The kernels switched on, once with the smallest tiles and blocks of a few rows, once with those that are used;
    their device."""
    from peft_sparse.ops import blocks, triton_tiles

    if request.param == "small tiles":
        monkeypatch.setattr(triton_tiles, "ELEMENTWISE_TILE", triton_tiles.Tile(SMALL, SMALL, warps=1))
        monkeypatch.setattr(triton_tiles, "REDUCE_TILE", triton_tiles.Tile(SMALL, SMALL, warps=1))
        monkeypatch.setattr(blocks, "MIN_ROWS", 24)  # a block ends inside of a tile
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(blocks, "LARGE_BLOCK_ELEMENTS", 1)
    with ops.use_triton():
        yield torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
