"""A merged model's `save_pretrained` writes its model card beside the weights, and so do conversions.

What merging gives is a plain transformers model, whose `save_pretrained` writes none. So a merged model gets one that
does, for itself alone: classes are left as they are.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from peft_sparse.checkpoint.card import write_model_card
from peft_sparse.checkpoint.labels import keep_labels
from peft_sparse.linears import check_saves_unpacked
from peft_sparse.tuners.sparse_model import AFTER_MERGE


def write_card_when_saved(model: PreTrainedModel) -> None:
    """Make the `save_pretrained` of this model write a card too."""
    model.save_pretrained = partial(save_with_card, model)


AFTER_MERGE.append(write_card_when_saved)


def save_with_card(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, whatever the model has in its place, and a model card."""
    check_saves_unpacked(model)
    save = type(model).save_pretrained
    given = inspect.signature(save).bind(model, *args, **kwargs).arguments
    save(model, *args, **kwargs)
    folder, hub = Path(given["save_directory"]), given.get("kwargs", {})
    adapter_alone = getattr(model, "_hf_peft_config_loaded", False)
    # A card's numbers are counted in the files, which codes of bitsandbytes do not allow.
    quantised = getattr(model.config, "quantization_config", None) is not None
    if not given.get("is_main_process", True) or adapter_alone or not folder.is_dir():
        return
    keep_labels(model, folder)
    if quantised:
        return
    card = write_model_card(folder)
    if given.get("push_to_hub", False):  # with transformers' card, which cannot be had otherwise
        HfApi(token=given.get("token")).upload_file(
            path_or_fileobj=card,
            path_in_repo=card.name,
            repo_id=hub.get("repo_id", folder.name),
            commit_message="Upload model card",
            create_pr=hub.get("create_pr", False),
        )
