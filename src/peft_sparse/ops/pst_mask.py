"""PST's mask, refreshed when a factor changed and kept as bits in between.

A mask is selected from the scores of a whole layer, which costs about a third of a forward matmul, so it is kept:
over accumulation steps, evaluation and generation. One bit a weight is all that stays.

Whether it is still right is decided by the content of what it was selected from, see fingerprint.py.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import torch

from peft_sparse._graphs import leaves_python, values_unknown
from peft_sparse.ops import reference
from peft_sparse.ops.blocks import autocast_off
from peft_sparse.ops.fingerprint import Fingerprint
from peft_sparse.ops.reference import (
    PstFactors,
    PstScales,
    pst_scores,
    pst_updated_weight,
    reference_in_use,
)
from peft_sparse.sparsity import pack_mask, select_mask, select_mask_in_graph
from peft_sparse.sparsity.importance import score_dtype


class MaskCache:
    """The mask of one adapter of one layer, if it was selected before.

    A copy or an unpickled one starts empty: what it belongs to is another layer.
    """

    def __init__(self) -> None:
        number = next(_HANDLES)
        self.handle = torch.tensor(number, device="cpu")  # a plain number would have a compiler make a graph for each
        # the mask, and what it was selected from; one tuple, so that threads which share a layer (nn.DataParallel)
        # never see the one without the other
        self._kept: tuple[torch.Tensor, list[Fingerprint]] | None = None
        _CACHES[number] = self

    def __reduce__(self) -> tuple[type[MaskCache], tuple[()]]:
        return MaskCache, ()

    def mark_stale(self) -> None:
        """Select anew in the next forward."""
        self._kept = None

    def get(self, tensors: list[torch.Tensor]) -> torch.Tensor | None:
        """The mask that was kept for exactly these tensors, or None."""
        kept = self._kept
        if kept is None or len(tensors) != len(kept[1]):
            return None
        packed, inputs = kept
        if packed.is_inference() and not torch.is_inference_mode_enabled():
            return None  # made in inference mode, so autograd would refuse to save it
        same = all(kept.matches(tensor) for kept, tensor in zip(inputs, tensors, strict=True))
        return packed if same else None

    def put(self, packed: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        """Keep a mask with what it was selected from."""
        self._kept = packed, [Fingerprint.of(tensor) for tensor in tensors]


_HANDLES = count()
_CACHES: weakref.WeakValueDictionary[int, MaskCache] = weakref.WeakValueDictionary()


@torch.no_grad()
def pst_mask(
    cache: MaskCache,
    weight: torch.Tensor,
    pruned: torch.Tensor,
    group_size: int,
    factors: PstFactors,
    scales: PstScales,
) -> torch.Tensor:
    """The mask of the weights whose scores are largest, see [`peft_sparse.ops.reference.pst_scores`].

    Args:
        cache: of the layer and adapter that the mask is for.
        weight: W, (out, in).
        pruned: int64 scalar, how many weights of each comparison group are pruned.
        group_size: size of a comparison group: the whole layer, or M.
        factors, scales: of the layer.

    Returns:
        uint8 (out, ceil(in / 8)), as [`peft_sparse.sparsity.pack_mask`] packs it. A compiled graph gets a copy of its
        own.
    """
    if leaves_python():  # the mask is selected anew in each of the graph's forwards
        with autocast_off(weight):
            scores = pst_scores(pst_updated_weight(weight, factors, scales), factors, scales)
            return pack_mask(select_mask_in_graph(scores, pruned, group_size))
    if reference_in_use():
        with autocast_off(weight):
            if torch._C._functorch.is_batchedtensor(pruned):  # of several models at once, which have a count each
                scores = pst_scores(pst_updated_weight(weight, factors, scales), factors, scales)
                return pack_mask(select_mask_in_graph(scores, pruned, group_size))
            return reference.pst_mask(weight, int(pruned), group_size, factors, scales)
    if values_unknown(weight):  # no scores to select by
        tensors = [tensor for tensor in factors if tensor is not None]
        names = "".join(name for name, tensor in factors._asdict().items() if tensor is not None)
        # Outside of a compiler nothing is looked up, and a FakeTensorMode takes no tensor from before.
        handle = cache.handle if torch.compiler.is_compiling() else torch.zeros((), dtype=torch.int64, device="cpu")
        return _pst_mask_op(handle, weight, pruned, group_size, tensors, names, *scales)
    tensors = [pruned, weight, *(tensor for tensor in factors if tensor is not None)]
    packed = cache.get(tensors)
    if packed is None:
        with autocast_off(weight):  # which would form the scores in half precision
            packed = _select(weight, int(pruned), group_size, factors, scales)
        cache.put(packed, tensors)
    return packed


# Written out, since torch 2.6 does not derive it from `list[torch.Tensor]`.
_SCHEMA = (
    "(Tensor handle, Tensor weight, Tensor pruned, int group_size, Tensor[] factors, str names, "
    "float beta, float alpha1, float alpha2) -> Tensor"
)


# A CUDA graph would copy the mask that was kept when it was recorded, for good.
_TAGS: dict[str, Any] = {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


# An operator of its own: a compiler does not look into it, where reading the cache would break the graph.
@torch.library.custom_op("peft_sparse::pst_mask", mutates_args=(), schema=_SCHEMA, **_TAGS)
def _pst_mask_op(
    handle: torch.Tensor,
    weight: torch.Tensor,
    pruned: torch.Tensor,
    group_size: int,
    factors: list[torch.Tensor],
    names: str,
    beta: float,
    alpha1: float,
    alpha2: float,
) -> torch.Tensor:
    named = PstFactors(**dict(zip(names, factors, strict=True)))
    # An operator returns new memory. Should its layer be gone, nothing can be kept for it.
    cache = _CACHES.get(int(handle)) or MaskCache()
    return pst_mask(cache, weight, pruned, group_size, named, PstScales(beta, alpha1, alpha2)).clone()


@_pst_mask_op.register_fake
def _(handle: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 7) // 8), dtype=torch.uint8)


def _select(
    weight: torch.Tensor, num_pruned: int, group_size: int, factors: PstFactors, scales: PstScales
) -> torch.Tensor:
    if num_pruned == 0:
        kept = torch.ones((1, weight.shape[1]), dtype=torch.bool, device=weight.device)
        return pack_mask(kept).expand(weight.shape[0], -1).contiguous()
    return pack_mask(select_mask(_scores(weight, factors, scales), num_pruned, group_size))


def _scores(weight: torch.Tensor, factors: PstFactors, scales: PstScales) -> torch.Tensor:
    """The scores of the reference, with A B + R + C as one product: [A, R, 1] times [B; 1; C]."""
    _, _, _, A, B, R, C, S = factors
    if S is not None:
        return S.to(score_dtype(S.dtype))
    updated = pst_updated_weight(weight, factors, scales)
    scores = updated.abs() if updated.data_ptr() == weight.data_ptr() else updated.abs_()
    if A is None or B is None or R is None or C is None:
        return scores
    left = torch.cat([scales.alpha1 * A, scales.alpha2 * torch.stack([R, torch.ones_like(R)], 1)], 1)
    right = torch.cat([B, torch.ones_like(C)[None], C[None]])
    return scores.addmm_(left.to(scores.dtype), right.to(scores.dtype))
