"""Which tokens count: a batch's own masks, brought to the shape in which a linear meets its inputs.

Most linears see (sequences, tokens, in) or all tokens in one row after another, and the mask fits as it is. Some do
not: a decoder's keys and values for cross-attention are computed from the encoder's tokens, so they go by the
encoder's mask; and an expert of a mixture sees only the tokens that were routed to it, in rows that no longer tell
where they come from. Those rows are copies of rows of the mixture's input, so they are recognised by their bits. And a
tower for images or sound, beside one for text, has tokens of its own, to which the mask of the text says nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from peft_sparse.pruning.token_inputs import text_config

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TokenMasks:
    """The masks of the batch that is running."""

    def __init__(self) -> None:
        self.batch: dict[str, torch.Tensor] = {}
        self._encoder_states: list[torch.Tensor] = []
        self._of_text = True
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None  # of a mixture's input: those that count, others
        self._told = False
        self._routed: torch.Tensor | None = None  # bool (rows,): which rows of the running expert's input count

    def start(self, batch: dict[str, torch.Tensor]) -> None:
        """A batch begins."""
        self.batch, self._rows, self._routed = batch, None, None
        self._encoder_states, self._of_text = [], True

    def enter_block(self, in_decoder: bool, of_text: bool, args: tuple, kwargs: dict[str, Any]) -> None:
        """A block is called; in a decoder, one of its arguments is what the encoder returned. For `of_text` see
        [`may_see_text`]."""
        self._of_text, self._encoder_states = of_text, []
        if in_decoder:
            others = [*args[1:], *(value for key, value in kwargs.items() if key != "hidden_states")]
            self._encoder_states = [value for value in others if isinstance(value, torch.Tensor) and value.dim() == 3]

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inputs of a linear and their mask.

        Args:
            x: (sequences, tokens, in), or (rows, in) in a block that flattens them.

        Returns:
            `x`, in a shape that fits the mask, and bool of that shape without the last dimension, True for tokens that
            count; None: all do, or there is no telling.
        """
        mask = self._token_mask(x)
        if mask is not None and x.dim() > 3:  # of a single head, as the latent keys of DeepSeek-V3
            x = x.squeeze(tuple(range(1, x.dim() - 1))) if x[..., 0].numel() == mask.numel() else x
        if mask is None or x.dim() != 2:
            return x, mask
        if x.shape[0] == mask.numel():
            return x.reshape(*mask.shape, -1), mask
        self._see_routed(x)
        if self._routed is not None and len(self._routed) == len(x):
            return x, self._routed
        return x, mask

    def _token_mask(self, x: torch.Tensor) -> torch.Tensor | None:
        mask = self.batch.get("attention_mask")
        if self._encoder_states and not any(_is_copy(x, states) for states in self._encoder_states):
            mask = self.batch.get("decoder_attention_mask")
            if mask is None and "labels" in self.batch:
                mask = self.batch["labels"] != -100  # the decoder's inputs are the labels, shifted by one
        elif not self._encoder_states and not self._of_text and "input_ids" in self.batch:
            mask = None
        return None if mask is None else _of_tokens(mask.to(x.device))

    def if_it_fits(self, mask: torch.Tensor | None, x: torch.Tensor, name: str) -> torch.Tensor | None:
        """The mask, or None if it does not fit the inputs of a linear; the first time that counts padding, a warning
        says so."""
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        of_tokens = x.dim() == 2 or x.shape[0] == mask.shape[0]  # not so what a model makes of positions alone
        if of_tokens and not self._told and not bool(mask.all()):
            self._told = True
            warnings.warn(
                f"The inputs of `{name}` are {tuple(x.shape[:-1])} and the mask is {tuple(mask.shape)}, so padding "
                "among them cannot be told and counts; if these are the mask's tokens, calibrate without padding.",
                stacklevel=2,
            )
        return None

    # Mixtures of experts

    def hooks_for(self, block: nn.Module, linears: list[nn.Module]) -> list[Any]:
        """Handles of hooks that follow the tokens to the experts of a block, if it has such: modules in a list or
        dictionary, with linears that are gathered."""
        wanted, hooks = set(linears), []
        for module in block.modules():
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            experts = [child for child in module.children() if wanted.intersection(child.modules())]
            above = [outer for outer in block.modules() if module in set(outer.children())]
            hooks += [one.register_forward_pre_hook(self._see_input, with_kwargs=True) for one in (*above, *experts)]
            if type(module).forward is not nn.Module.forward and experts:
                hooks.append(module.register_forward_pre_hook(self._see_input, with_kwargs=True))
        return hooks

    def _see_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if x is None or x.dim() < 2 or not x.is_floating_point():
            return
        mask = self._token_mask(x)
        if mask is None or bool(mask.all()):
            return
        if x[..., 0].numel() == mask.numel():
            hashes, flat = _row_hashes(x.reshape(-1, x.shape[-1])), mask.reshape(-1)
            self._rows, self._routed = (hashes[flat], hashes[~flat]), None
        else:
            self._see_routed(x.reshape(-1, x.shape[-1]))

    def _see_routed(self, x: torch.Tensor) -> None:
        """Rows that all come from the mixture's input: the start of an expert. Others are from further inside."""
        if self._rows is None:
            return
        hashes, (counted, padded) = _row_hashes(x), self._rows
        counts = torch.isin(hashes, counted)
        if bool((counts | torch.isin(hashes, padded)).all()):
            self._routed = counts


def _of_tokens(mask: torch.Tensor) -> torch.Tensor | None:
    """bool (sequences, tokens) from an attention mask of that shape, or from one that says what each token may attend
    to, (sequences, heads, tokens, tokens) or without heads: padding may not attend to itself. None: another shape."""
    additive = mask.dim() > 2 and mask.is_floating_point() and not bool((mask > 0).any())  # 0 where a token is seen
    seen = mask == 0 if additive else mask != 0
    if mask.dim() == 4:
        seen = seen[:, 0]
    if seen.dim() == 2:
        return seen
    if seen.dim() != 3 or seen.shape[1] not in (1, seen.shape[2]):
        return None
    return seen[:, 0] if seen.shape[1] == 1 else seen.diagonal(dim1=1, dim2=2)


def may_see_text(model: nn.Module, path: str) -> bool:
    """Whether the tokens of `input_ids` may reach a module: not in a part of a model of transformers that has a config
    of another kind than the whole, and in it no vocabulary, as the vision tower of a CLIP."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if isinstance(config, PreTrainedConfig):
            has_vocabulary = getattr(text_config(config), "vocab_size", None) is not None
            return has_vocabulary or type(config) is type(getattr(model, "config", None))
    return True


def _is_copy(x: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether a linear's inputs are what its block was called with, maybe on another device by now. The first tokens
    tell: those of two sides are never the same."""
    if x is states or x.shape != states.shape or x.dtype != states.dtype:
        return x is states
    return torch.equal(x[:, 0], states[:, 0].to(x.device))


def _row_hashes(x: torch.Tensor) -> torch.Tensor:
    """int64 (rows,), equal for equal rows (rows, in) and for others with a chance of 2^-64: integer arithmetic, which
    rounds nothing whatever the shape."""
    generator = torch.Generator().manual_seed(0)
    low, high, cpu = -(2**62), 2**62, torch.device("cpu")
    factors = torch.randint(low, high, x.shape[-1:], generator=generator, dtype=torch.int64, device=cpu).to(x.device)
    return (x.detach().contiguous().view(INTEGERS[x.element_size()]).to(torch.int64) * (2 * factors + 1)).sum(-1)


def update_hook(masks: TokenMasks, update: Callable[[torch.Tensor, torch.Tensor | None], None]) -> Callable[..., None]:
    """A forward pre-hook (with kwargs) for a linear that hands its inputs and their mask to `update`."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        update(*masks.of((*args, *kwargs.values())[0]))

    return hook
