"""What a pruner asks of its calibration data, checked before anything is run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from peft_sparse.pruning.data import Batch, collate, sequences_of
from peft_sparse.pruning.token_inputs import check_keys, check_token_inputs, text_config

# What models call their embeddings of positions.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")
WAY_OUT = "pass an iterable of dicts as the model's forward takes them, such as [{'input_ids': ...}]"


def check_batches(batches: Iterable[Mapping[str, torch.Tensor]], model: nn.Module | None = None) -> list[Batch]:
    """Read the whole calibration set, which may be a generator or a tokenized `datasets` dataset.

    Args:
        batches: dicts of tensors; of a dataset every row is a batch of one sequence.
        model: whose inputs the columns of a dataset are; others are left out, as by transformers' Trainer.

    Returns:
        The batches as plain dicts.

    Raises:
        ValueError: if there are none, if one is not a dict of tensors, if one holds NaN or infinity, if a key looks
            like a mistyped one, if its mask is not of the shape of its tokens, or if its sequences are longer than the
            model takes or have tokens that it has not. In an additive attention mask infinity is meant, so tensors
            whose name ends in "mask" may hold it.
    """
    if isinstance(batches, (Mapping, torch.Tensor, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"Calibration takes several batches, got one {type(batches).__name__}; {WAY_OUT}.")
    if _is_dataset(batches):
        batches = _of_dataset(batches, model)
    checked = []
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not batch:
            raise ValueError(f"A calibration batch is a dict of tensors, got {type(batch).__name__}; {WAY_OUT}.")
        for key, value in batch.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"A calibration batch is a dict of tensors, got {type(value).__name__} for `{key}` in batch "
                    f"{index}; {WAY_OUT}, or make them with `calibration_batches`."
                )
            if value.is_floating_point() and not key.endswith("mask") and not bool(value.isfinite().all()):
                raise ValueError(
                    f"Calibration needs finite inputs, got NaN or infinity in `{key}` of batch {index}; leave that "
                    "batch out."
                )
        checked.append(dict(batch))
    if not checked:
        raise ValueError(
            f"Calibration needs at least one batch, got none (a generator is used up by one loop); {WAY_OUT}."
        )
    if model is not None:
        _check_lengths(model, checked)
        check_keys(model, checked)
        check_token_inputs(model, checked)
    return checked


def _is_dataset(source: Any) -> bool:
    """A `datasets.Dataset` or `IterableDataset`, without importing that package."""
    return hasattr(source, "column_names") and hasattr(source, "features")


def _of_dataset(dataset: Any, model: nn.Module | None) -> Iterable[Batch]:
    taken = None if model is None else set(inspect.signature(model.forward).parameters)
    rows = ({key: value for key, value in row.items() if taken is None or key in taken} for row in dataset)
    first = next(rows, None)
    if first is None:
        return []
    if not sequences_of(first):
        raise ValueError(
            f"A dataset for calibration has columns of numbers that the model's forward takes, such as `input_ids`, "
            f"got {list(dataset.column_names or first)}; tokenize it, or pass "
            "`calibration_batches(dataset, tokenizer)`."
        )
    return (collate([sequences_of(row)], 0) for row in chain([first], rows))


# The model's context


def _check_lengths(model: nn.Module, batches: list[Batch]) -> None:
    limit = context_length(model)
    if limit is None:
        return
    for index, batch in enumerate(batches):
        for key, value in batch.items():
            of_tokens = key.endswith(("input_ids", "inputs_embeds")) or (key == "labels" and value.dim() == 2)
            if of_tokens and value.dim() > 1 and value.shape[1] > limit:
                raise ValueError(
                    f"Calibration sequences fit into the model's context of {limit} tokens, got {value.shape[1]} in "
                    f"`{key}` of batch {index}; cut them, for example with `calibration_batches(..., length={limit})`."
                )


def context_length(model: nn.Module) -> int | None:
    """The longest sequence that a model takes, by its config; None: it has no limit, or does not say."""
    limit, learned = _limit_of_config(model), learned_positions(model)
    return limit if limit is None or learned is None else min(limit, learned)


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has embeddings for, beyond which it cannot run; None: it computes them, as Llama
    does, or needs none."""
    limit = _limit_of_config(model)
    if limit is None:
        return None
    # RoBERTa and its kin count positions from behind the index of the padding token
    taken = (0 if table.padding_idx is None else table.padding_idx + 1 for table in _position_tables(model))
    return min((limit - first for first in taken), default=None)


def padding_of_positions(model: nn.Module) -> int | None:
    """The id of the padding token where positions are counted from behind it; None for models that do not."""
    return next((table.padding_idx for table in _position_tables(model) if table.padding_idx is not None), None)


def _position_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    limit = _limit_of_config(model)
    for name, table in model.named_modules():
        if limit is None or not isinstance(table, nn.Embedding) or not name.endswith(_POSITION_TABLES):
            continue
        # OPT and BART have two rows more than positions; tables of another size are those of images
        if table.num_embeddings - getattr(table, "offset", 0) == limit:
            yield table


def check_positions(model: nn.Module, name: str, length: int) -> None:
    """Raises:
    ValueError: if sequences of so many tokens have no position embeddings; `name` is what asks for that length."""
    limit = learned_positions(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"`{name}` is at most {limit}, the positions that the model has embeddings for, got {length}; take less."
        )


def _limit_of_config(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "max_target_positions")
    found = [getattr(one, name, None) for one in (text_config(config), config) for name in names]
    return next((int(limit) for limit in found if isinstance(limit, int) and limit > 0), None)
