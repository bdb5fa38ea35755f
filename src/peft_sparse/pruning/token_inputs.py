"""Inputs, token ids and masks, compared with a model and with each other before a run.

A model of transformers takes any name and leaves out what it does not know, so that a mistyped mask would make text of
its padding. An id that is out of range ends a run on a GPU with an assertion of its kernels, which leaves the process
unusable, and on a CPU with an error that names no batch. A mask of another length marks other tokens.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

# What transformers' models, tokenizers and collators have besides the arguments of a model's forward.
_KNOWN_TO_ALL = {
    *TransformersKwargs.__annotations__,
    "label",
    "label_ids",
    "labels",
    "length",
    "mm_token_type_ids",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "special_tokens_mask",
    "token_type_ids",
}


def check_keys(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raises:
    ValueError: if a batch has a key that the forward does not take, or leaves out although it looks like one that it
        takes, or like a mask of the tokens."""
    taken, takes_any = _named_inputs(model)
    if takes_any and not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return  # what it does with the others is its own
    known = taken | _KNOWN_TO_ALL if takes_any else taken
    for index, batch in enumerate(batches):
        for key in batch.keys() - known:
            near = next(iter(difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.75)), None)
            mistyped = near is not None and near not in batch
            if not takes_any or mistyped or _is_only_mask(key, batch):
                raise ValueError(
                    f"A calibration batch has the inputs of the model's forward, got `{key}` in batch {index}, which "
                    f"{type(model).__name__} does not know{f' (the nearest name is `{near}`)' if mistyped else ''}; "
                    "mend it, or leave it out."
                )


def _named_inputs(model: nn.Module) -> tuple[set[str], bool]:
    """The arguments of a model's forward, and whether it takes others too, which it may hand on to models inside."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return {parameter.name for parameter in parameters}, False
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {name for module in [model, *inside] for name in inspect.signature(module.forward).parameters}, True


def _is_only_mask(key: str, batch: Mapping[str, torch.Tensor]) -> bool:
    ids = batch.get("input_ids")
    of_tokens = key.endswith("mask") and ids is not None and batch[key].shape == ids.shape
    return of_tokens and "attention_mask" not in batch


def check_token_inputs(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raises:
    ValueError: if token ids of a batch are not those of the model's vocabulary or of another shape than a transformer
        takes, or if its masks do not fit them."""
    size_of = {"input_ids": vocabulary_size, "decoder_input_ids": _decoder_vocabulary_size}
    for index, batch in enumerate(batches):
        for key, ids in batch.items():
            if key.endswith("input_ids"):
                if hasattr(model, "config"):
                    _check_shape(key, ids, index)
                _check_mask(key, ids, batch.get(key.replace("input_ids", "attention_mask")), index)
                if key in size_of and (size := size_of[key](model)) is not None:
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
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"Token ids are int64 or int32, got {ids.dtype} for `{key}` of batch {index}; take what the tokenizer "
            "gives."
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


def _decoder_vocabulary_size(model: nn.Module) -> int | None:
    """The same of the decoder, which may have another vocabulary than the encoder beside it (Marian)."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    return None if decoder is None else vocabulary_size(decoder)


def text_config(config: Any) -> Any:
    """The part of a model's config that is about text; all of it where there is no telling, as in a MusicGen, whose
    encoder and decoder are both called so."""
    try:
        return config if not hasattr(config, "get_text_config") else config.get_text_config()
    except ValueError:
        return config
