"""What a packed model's `save_pretrained` would write, plain transformers would read back as random weights and a
warning, so that is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_sparse.linears.packed import PackedLinear


def refuse_save_pretrained(model: nn.Module) -> None:
    """Make a transformers model's `save_pretrained` raise while it is packed, unless it saves an adapter alone."""
    if isinstance(model, PreTrainedModel) and is_packed(model) and "save_pretrained" not in model.__dict__:
        model.save_pretrained = partial(_save_unpacked, model)


def allow_save_pretrained(model: nn.Module) -> None:
    """Take back what [`refuse_save_pretrained`] did."""
    if getattr(model.__dict__.get("save_pretrained"), "func", None) is _save_unpacked:
        del model.save_pretrained


def _save_unpacked(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    check_saves_unpacked(model)
    type(model).save_pretrained(model, *args, **kwargs)


def check_saves_unpacked(model: PreTrainedModel) -> None:
    """Raises:
    ValueError: if `save_pretrained` would write packed weights."""
    if is_packed(model) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "`save_pretrained` writes weights that plain transformers can read, got a packed model, which it would "
            "load as random weights; use `peft_sparse.save_sparse(model, dir)`, or call `unpack_model(model)` first."
        )


def is_packed(model: nn.Module) -> bool:
    """Whether any of its linears is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())
