"""What a training log says of the masks: how sparse they are, how much of them changed, and how scores lie.

    sparsity         share of the adapted weights that the forward uses as zero; of PST, that its masks prune, without
                     zeros that a base had before and the masks keep
    mask_churn       share of them that changed state, kept or pruned, since the last log
    score_mean, score_std, score_kept_mean, score_pruned_mean     of PST's scores over all layers

Masks of the last log are kept as bits, an eighth of a byte a weight, on the device where they were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peft_sparse.linears import is_share
from peft_sparse.sparsity import dense_weight, pack_mask, unpack_mask
from peft_sparse.tuners.pst import PstLinear, driven_adapters
from peft_sparse.tuners.sparse_layer import SparseLayer


class MaskLog:
    """Compares masks with those of the last look.

    Args:
        model: with PST or SPP layers; the first look.
        scores: also measure PST's scores, which costs a pass over them.
    """

    def __init__(self, model: nn.Module, scores: bool = True) -> None:
        self.scores = scores
        self._masks = {name: pack_mask(mask) for name, mask in _masks(model)}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """The numbers now, and the masks to compare with at the next call.

        Weights that are sharded over processes are in no process whole: then only `sparsity` is told, of PST.
        """
        weights = zeros = changed = 0
        for name, mask in _masks(model):
            packed = pack_mask(mask)
            before = self._masks.get(name)
            if before is not None:
                width = mask.shape[1]
                changed += int((unpack_mask(before.to(packed.device), width) != mask).sum())
            self._masks[name] = packed
            weights, zeros = weights + mask.numel(), zeros + int((~mask).sum())
        if not weights:
            return counted_sparsity(model)
        numbers = {"sparsity": zeros / weights, "mask_churn": changed / weights}
        return numbers | (score_statistics(model) if self.scores else {})


def counted_sparsity(model: nn.Module) -> dict[str, float]:
    """PST's sparsity by its counts alone, which every process has; of several adapters in a layer the last one's."""
    weights = zeros = 0
    for layer in sparse_layers(model):
        if isinstance(layer, PstLinear) and (names := layer.present_adapters(layer.active_adapters)):
            weights += layer.in_features * layer.out_features
            zeros += layer.sparsity_progress(names[-1])[1] * layer.num_groups(names[-1])
    return {"sparsity": zeros / weights} if weights else {}


@torch.no_grad()
def score_statistics(model: nn.Module) -> dict[str, float]:
    """Mean and spread of PST's scores over all layers, and the means of those kept and of those pruned.

    Returns:
        {} for a model without PST layers; a mean over nothing, such as the pruned ones at sparsity 0, is left out.
    """
    count = kept_count = total = squares = kept_total = 0.0
    driven = set(driven_adapters(model)) if has_pst_layers(model) else set()
    for layer, adapter_name, weight in _adapted(model):
        if not isinstance(layer, PstLinear) or (layer, adapter_name) not in driven:
            continue
        scores = layer.get_scores(adapter_name, weight)
        kept = scores[layer.get_mask(adapter_name, weight)]
        count, kept_count = count + scores.numel(), kept_count + kept.numel()
        total += float(scores.sum(dtype=torch.float64))
        squares += float(scores.double().square().sum())
        kept_total += float(kept.sum(dtype=torch.float64))
    if not count:
        return {}
    mean = total / count
    found = {"score_mean": mean, "score_std": math.sqrt(max(squares / count - mean**2, 0.0))}
    if kept_count:
        found["score_kept_mean"] = kept_total / kept_count
    if kept_count < count:
        found["score_pruned_mean"] = (total - kept_total) / (count - kept_count)
    return found


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    """The layers of PST and SPP in a model."""
    return [layer for layer in model.modules() if isinstance(layer, SparseLayer)]


def has_pst_layers(model: nn.Module) -> bool:
    """Whether there is a schedule to drive."""
    return any(isinstance(layer, PstLinear) for layer in model.modules())


@torch.no_grad()
def _masks(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name of the layer, bool mask (out, in)), True = kept: of its last adapter, whose weight the forward uses; for
    SPP where that weight is not zero."""
    for layer, adapter_name, weight in _adapted(model):
        if adapter_name != layer.present_adapters(layer.active_adapters)[-1]:
            continue
        if isinstance(layer, PstLinear):
            yield layer.module_name, layer.get_mask(adapter_name, weight)
        else:
            yield layer.module_name, dense_weight(layer.effective_weight(adapter_name, weight)) != 0


@torch.no_grad()
def _adapted(model: nn.Module) -> Iterator[tuple[SparseLayer, str, Any]]:
    """Layers whose weights are in this process, each with its active adapters in order, and the weight that these are
    given: what the adapters before have made of the base weight."""
    for layer in sparse_layers(model):
        if not _is_whole(layer):
            continue
        with layer.weights_loaded():
            weight, before = layer.base_weight, None
            for adapter_name in layer.present_adapters(layer.active_adapters):
                if before is not None:
                    weight = layer.effective_weight(before, weight)
                yield layer, adapter_name, weight
                before = adapter_name


def _is_whole(layer: SparseLayer) -> bool:
    """Whether all of a layer's weights are in this process, and not shares of FSDP2 or ZeRO-3."""
    return not any(map(is_share, layer.parameters()))
