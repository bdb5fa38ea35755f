"""A model's generation config is saved with the fields that it has, as it was loaded.

Published ones, such as those of Llama-2-chat and Vicuna, name a temperature without `do_sample`. transformers loads
them, but refuses to save one that has changed since, which Trainer does as it gives the model its tokenizer's special
tokens, and 5.0 saves none of them. These fields are not ours to judge, and no work is lost over them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


@contextmanager
def generation_config_as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model is saved though transformers warns of its generation config."""
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    kept = copy.copy(config)
    kept.__class__ = _that_only_warns(type(config))
    model.generation_config = kept
    try:
        yield
    finally:
        model.generation_config = config


def _that_only_warns(config_class: Any) -> Any:
    class AsItIs(config_class):
        """A generation config that is not refused for what transformers would ignore."""

        def validate(self, strict: bool = False) -> None:
            super().validate(strict=False)

    return AsItIs
