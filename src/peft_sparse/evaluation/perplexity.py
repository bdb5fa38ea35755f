"""Perplexity of a language model on a text: exp of the mean negative log-likelihood of its tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from peft_sparse.pruning.calibration import evaluation_mode
from peft_sparse.pruning.checks import check_positions, context_length
from peft_sparse.pruning.offload import execution_device
from peft_sparse.pruning.token_inputs import check_token_inputs

DEFAULT_WINDOW = 512
PROBE = 8  # tokens with which it is tried that a model is causal


@torch.no_grad()
def perplexity(model: nn.Module, input_ids: torch.Tensor, window: int | None = None, progress: bool = True) -> float:
    """exp(-1/n sum_t log p(x_t | the tokens before x_t in its window)), over windows that do not overlap.

    The first token of a window is given and not predicted, so a window of k tokens counts k - 1 predictions; the last
    window may be shorter. Perplexities compare only between runs with the same tokenizer, text and window: a longer
    window gives more context, hence a lower value.

    Args:
        model: a causal language model whose output has `logits`; in evaluation mode while it is measured.
        input_ids: (tokens,) of the whole text, at least 2.
        window: tokens per window, at least 2 and at most what the model takes; None: 512, or the model's context where
            that is shorter.
        progress: show a bar over the windows.

    Returns:
        A number from 1 up; the size of the vocabulary for a model that guesses.

    Raises:
        ValueError: if `input_ids` is not one row of at least 2 tokens of the model's, or `window` is below 2 or beyond
            the positions that the model has embeddings for; or if the model is no causal language model.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> _ = model.lm_head.weight.data.zero_()  # guesses
        >>> round(perplexity(model, torch.arange(20) % 8, window=5, progress=False), 4)
        8.0
    """
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(
            f"`input_ids` is a tensor of token ids, got {type(input_ids).__name__}; take "
            "`tokenizer(text, return_tensors='pt').input_ids[0]`."
        )
    if input_ids.dim() != 1 or len(input_ids) < 2 or input_ids.is_floating_point():
        raise ValueError(
            f"`input_ids` is one row of at least 2 token ids, shape (tokens,), got shape {tuple(input_ids.shape)} of "
            f"{input_ids.dtype}; take `tokenizer(text, return_tensors='pt').input_ids[0]`."
        )
    if window is None:
        window = min(DEFAULT_WINDOW, context_length(model) or DEFAULT_WINDOW)
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(
            f"`window` counts the tokens of a window, at least 2 so that one is predicted, got {window!r}."
        )
    _check_class(model)
    check_positions(model, "window", min(window, len(input_ids)))
    check_token_inputs(model, [{"input_ids": input_ids[None]}])
    device, input_ids = execution_device(model), input_ids.long()  # of int32 there is no cross-entropy
    total, predicted = 0.0, 0
    with evaluation_mode(model):
        _check_order(model, input_ids[: min(window, PROBE)].to(device))
        for piece in tqdm(input_ids.split(window), desc="Perplexity", unit="window", disable=not progress):
            if len(piece) < 2:
                continue
            piece = piece.to(device)
            logits = _logits(model, piece[None])[0, :-1].float()  # (window - 1, vocabulary)
            total += F.cross_entropy(logits, piece[1:].to(logits.device), reduction="sum").item()
            predicted += len(piece) - 1
    return perplexity_of(total, predicted)


@torch.no_grad()
def check_causal(model: nn.Module, input_ids: torch.Tensor) -> None:
    """Before a model is tuned, or its loss is taken, as a causal language model.

    Args:
        input_ids: (tokens,) of some text, of which the first few are read.

    Raises:
        ValueError: if what it predicts depends on what comes later.
    """
    _check_class(model)
    with evaluation_mode(model):
        _check_order(model, input_ids[:PROBE].to(execution_device(model)))


def _check_class(model: nn.Module) -> None:
    """An encoder has seen the text that its decoder predicts, and logits of a masked language model are those of the
    tokens themselves: both would give a number, but no perplexity."""
    get_base_model = getattr(model, "get_base_model", None)
    base: Any = model if get_base_model is None else get_base_model()
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) or name.endswith("ForMaskedLM"):
        raise ValueError(
            f"A causal language model predicts each token from those before it, got {name}, whose encoder sees them "
            "all; take the loss that it gives for `input_ids` and `labels` instead."
        )


def _check_order(model: nn.Module, piece: torch.Tensor) -> None:
    """No class and no config tells it of all models (an encoder that `AutoModelForCausalLM` loads is none without
    `is_decoder`), so it is tried: what comes later must not move what is predicted before it. Both texts are one
    batch, which rounds alike; to be larger than rounding, a change has half of the digits of the coarsest dtype."""
    first = len(piece) // 2
    other = piece.clone()
    other[first:] = (piece[first:] == 0).to(piece.dtype)
    with torch.compiler.set_stance("force_eager"):  # no graph for a shape that is seen once
        logits = _logits(model, torch.stack([piece, other]))
    dtypes = {logits.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    before, after = logits[:, :first].float()
    if (before - after).norm() > max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 * before.norm():
        raise ValueError(
            f"A causal language model predicts each token from those before it, got {type(model).__name__}, whose "
            "predictions change with the tokens after it too; load it as a decoder (`is_decoder=True`) if it was "
            "trained as one, or take the loss that it gives for `input_ids` and `labels` instead."
        )


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(sequences, tokens, vocabulary) of (sequences, tokens)."""
    output = model(input_ids=ids)
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        found = f"a {type(output).__name__} without any" if logits is None else f"shape {tuple(logits.shape)}"
        raise ValueError(
            "A causal language model has logits of the shape (sequences, tokens, vocabulary), "
            f"got {found} from {type(model).__name__} for {ids.shape[0]} x {ids.shape[1]} tokens; load it with "
            "AutoModelForCausalLM, without adapters that put tokens before the text."
        )
    return logits


def perplexity_of(total: float, predicted: float) -> float:
    """exp of the mean of a negative log-likelihood summed over tokens; NaN of none."""
    mean = total / predicted if predicted else math.nan
    return math.inf if mean >= 700 else math.exp(mean)
