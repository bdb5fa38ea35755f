"""Token ids and masks, compared with a model and with each other before a run.

An id that is out of range ends a run on a GPU with an assertion of its kernels, which leaves the process unusable, and
on a CPU with an error that names no batch. A mask of another length marks other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn


def check_token_inputs(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raises:
    ValueError: if token ids of a batch are not those of the model's vocabulary or of another shape than a transformer
        takes, or if its masks do not fit them."""
    size = vocabulary_size(model)
    for index, batch in enumerate(batches):
        for key, ids in batch.items():
            if key.endswith("input_ids"):
                if hasattr(model, "config"):
                    _check_shape(key, ids, index)
                _check_mask(key, ids, batch.get(key.replace("input_ids", "attention_mask")), index)
                if size is not None:
                    _check_ids(key, ids, size, index)


def _check_shape(key: str, ids: torch.Tensor, index: int) -> None:
    if ids.dim() < 2 or not ids.numel():
        raise ValueError(
            f"Token ids have the shape (sequences, tokens), got {tuple(ids.shape)} for `{key}` of batch {index}; for "
            f"one sequence take `{key}[None]`, and leave out what is empty."
        )


def _check_mask(key: str, ids: torch.Tensor, mask: torch.Tensor | None, index: int) -> None:
    if mask is not None and mask.dim() == 2 and ids.dim() == 2 and mask.shape != ids.shape:
        raise ValueError(
            f"A mask has an entry for each token, got shape {tuple(mask.shape)} beside `{key}` of shape "
            f"{tuple(ids.shape)} in batch {index}; take the one that the tokenizer gives with them, or leave it out."
        )


def _check_ids(key: str, ids: torch.Tensor, size: int, index: int) -> None:
    if ids.is_meta or not ids.numel():
        return
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"Token ids are integers, got {ids.dtype} for `{key}` of batch {index}; take what the tokenizer gives."
        )
    low, high = (int(end) for end in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(
            f"Token ids are those of the model's vocabulary, from 0 to {size - 1}, got {low if low < 0 else high} in "
            f"`{key}` of batch {index}; take the model's own tokenizer, or call `model.resize_token_embeddings`."
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens a model's input embeddings have; None: it has none, or does not say."""
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    if get_input_embeddings is None:
        return None
    try:
        embeddings = get_input_embeddings()
    except (NotImplementedError, AttributeError):  # how models of transformers say that they have none
        return None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
