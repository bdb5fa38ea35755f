"""A merged model's `save_pretrained` writes its model card beside the weights, and so do conversions; its
`push_to_hub` uploads it.

What merging gives is a plain transformers model, whose `save_pretrained` writes none, and whose `push_to_hub` uploads
an empty form. So a merged model gets two that do better, for itself alone: classes are left as they are.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel

from peft_sparse.checkpoint.card import write_model_card
from peft_sparse.checkpoint.hub import has_own_card
from peft_sparse.checkpoint.labels import keep_labels
from peft_sparse.linears import check_saves_unpacked
from peft_sparse.tuners.sparse_model import AFTER_MERGE


def write_card_when_saved(model: PreTrainedModel) -> None:
    """Make the `save_pretrained` of this model write a card too, and its `push_to_hub` upload it."""
    model.save_pretrained = partial(save_with_card, model)
    model.push_to_hub = partial(push_with_card, model)


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
        name = hub.get("repo_id", folder.name)
        _upload_card(card, name, HfApi(token=given.get("token")), create_pr=hub.get("create_pr", False))


def push_with_card(model: PreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
    """transformers' `push_to_hub`, then the card that was written while it saved, with the caller's tags. A card in
    the repository that is somebody's own stays.

    Returns:
        What transformers returns, the commit of the weights.
    """
    check_saves_unpacked(model)  # transformers makes the repository before it saves
    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / "README.md"

        def save(folder: str, *args: Any, **settings: Any) -> None:
            save_with_card(model, folder, *args, **settings)
            if (Path(folder) / card.name).is_file():
                shutil.copyfile(Path(folder) / card.name, card)

        model.save_pretrained = save
        try:
            commit = type(model).push_to_hub(model, repo_id, **kwargs)
        finally:
            write_card_when_saved(model)
        api, name = HfApi(token=kwargs.get("token")), commit.repo_url.repo_id
        revision = commit.pr_revision or kwargs.get("revision")
        asked = kwargs.get("create_pr", False) and commit.pr_revision is None  # none was opened, as no weight changed
        if card.is_file() and not has_own_card(api, name, revision):
            filled = ModelCard.load(card)
            filled.data.tags = sorted({*filled.data.tags, *(kwargs.get("tags") or ())})
            filled.save(card)
            _upload_card(card, name, api, revision=revision, create_pr=asked)
    return commit


def _upload_card(card: Path, repo_id: str, api: HfApi, **where: Any) -> None:
    api.upload_file(
        path_or_fileobj=card, path_in_repo=card.name, repo_id=repo_id, commit_message="Upload model card", **where
    )
