"""Magnitude pruning: the smallest |W| of every layer go (Han et al., arXiv 1506.02626). Needs no data.

It is the baseline that every other pruner has to beat, and what PST starts from at step 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from peft_sparse.linears import get_weight
from peft_sparse.pruning.budgets import resolve_sparsities
from peft_sparse.pruning.metadata import describe, record
from peft_sparse.pruning.offload import OffloadableWeight
from peft_sparse.pruning.targets import Names, find_targets, prune_by_scores
from peft_sparse.sparsity import Pattern, magnitude_importance, pattern_with_group

Model = TypeVar("Model", bound=nn.Module)


def prune_magnitude(
    model: Model,
    pattern: str | Pattern = "unstructured",
    sparsity: float | Mapping[str, float] | None = None,
    *,
    group: str | None = None,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
) -> Model:
    """Zero the weights of smallest magnitude, in place.

    All weights of a layer compete with each other, or the M weights of each group for an N:M pattern. Every layer has
    exactly `int(sparsity * numel)` zeros afterwards, or those that it had where these are more; of equal magnitudes
    those with the lower index go first.

    Args:
        model: any module; its dtype and device stay.
        pattern: `"unstructured"` or `"N:M"`, N weights kept of every M consecutive ones along in_features.
        sparsity: share of zeros in [0, 1); None: 0.5. An N:M pattern fixes it at 1 - N/M; another value is an error. A
            mapping from full names, ends of names or regexes, such as [`owl_sparsity`] returns, sets it by layer.
        group: what competes: `"layer"`, all weights of a layer (None), or `"row"`, those of one output, each with
            `int(sparsity * in_features)` zeros. Not for N:M.
        target_modules: names of linear layers, or a regex for full names, as in PEFT. None: every linear layer inside
            the model's repeated transformer blocks but routers and gates of experts, never embeddings, pooler or head.
        exclude_modules: linear layers to leave alone, given in the same way.

    Returns:
        `model` itself. A linear layer whose weight is shared with a module that is no target is left as it was.

    Raises:
        ValueError: for a malformed pattern, sparsity or group; if in_features of a target is not divisible by M, or
            its weight holds NaN; if there is nothing to prune. The model is untouched then. Weights are not copied, so
            after a keyboard interrupt the layers that were done are pruned; the same call does the rest.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = prune_magnitude(LlamaForCausalLM(config), "2:4")
        >>> (model.model.layers[0].mlp.up_proj.weight == 0).float().mean()
        tensor(0.5000)
    """
    pattern = pattern_with_group(pattern, group, default="layer")
    targets = find_targets(model, pattern, target_modules, exclude_modules)
    sparsities = resolve_sparsities(targets, pattern, sparsity)
    for name, linear in targets.items():
        weight = OffloadableWeight(model, name)
        with weight.loaded():
            prune_by_scores(name, linear, magnitude_importance(get_weight(linear).detach()), pattern, sparsities[name])
            weight.keep()
    record(model, describe("magnitude", pattern, sparsities))
    return model
