"""What is known about a pruned model: how it was pruned, on which data, and what that did to its outputs.

It goes into `model.config.peft_sparse["pruning"]`, so `save_pretrained` writes it and `from_pretrained` reads it:

    method, pattern, group, sparsity    a number, or one by full name where linears differ
    modules                             number of linears
    settings                            of the method, if it has any
    calibration                         sequences, tokens (that count; not of images or sounds), sha256 (of the batches
                                        in order)
    errors                              relative error of each linear's output on the calibration data, by full name
    version                             of peft-sparse
    earlier                             the same without errors for earlier runs on this model, if there were any

Another model than one of transformers has no place for it, and gets none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from peft_sparse.pruning.data import sequences_in
from peft_sparse.pruning.resume import hash_tensors
from peft_sparse.sparsity import Pattern
from peft_sparse.storage import CONFIG_KEY, PRUNING, facts_of, own_name, record_facts


def describe(
    method: str,
    pattern: Pattern,
    sparsities: Mapping[str, float],
    batches: list[dict[str, torch.Tensor]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts of a run, plain values only.

    Args:
        method: "magnitude", "wanda", ...
        pattern: as the pruner used it.
        sparsities: by full name of the linear.
        batches: calibration data, if there is any.
        settings: what else the result depends on.
    """
    different = set(sparsities.values())
    by_name = {own_name(name): share for name, share in sparsities.items()}
    facts: dict[str, Any] = {
        "method": method,
        "pattern": str(pattern),
        "group": getattr(pattern, "group", "M consecutive weights"),
        "sparsity": different.pop() if len(different) == 1 else by_name,
        "modules": len(sparsities),
    }
    if settings:
        facts["settings"] = dict(settings)
    if batches is not None:
        facts["calibration"] = _describe_batches(batches)
    return facts | {"version": version("peft-sparse")}


def _describe_batches(batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"sequences": sum(map(sequences_in, batches))}
    tokens = [_tokens_in(batch) for batch in batches]
    if None not in tokens:
        facts["tokens"] = sum(filter(None, tokens))
    tensors = ((f"{i}.{key}", tensor) for i, batch in enumerate(batches) for key, tensor in batch.items())
    return facts | {"sha256": hash_tensors(tensors)}


def _tokens_in(batch: dict[str, torch.Tensor]) -> int | None:
    """How many tokens of a batch count; None of images or sounds, which a model makes tokens of by itself."""
    ids, mask = batch.get("input_ids", batch.get("inputs_embeds")), batch.get("attention_mask")
    if ids is None:
        return None
    if mask is not None and mask.dim() == 2:
        return int(mask.bool().sum())
    return ids.shape[:2].numel()


def record(model: nn.Module, facts: dict[str, Any], errors: Mapping[str, float] | None = None) -> None:
    """Write the facts of a run into the config of a model of transformers."""
    before = facts_of(getattr(getattr(model, "config", None), CONFIG_KEY, None)).get(PRUNING)
    if isinstance(before, dict) and before:
        earlier = [*before.get("earlier", []), {key: before[key] for key in before.keys() - {"earlier", "errors"}}]
        facts = facts | {"earlier": earlier}
    if errors:
        facts = facts | {"errors": {own_name(name): float(f"{error:.6g}") for name, error in errors.items()}}
    record_facts(model, pruning=facts)
