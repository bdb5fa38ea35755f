"""Push a sparse model to the Hub, packed, with its card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from peft_sparse.checkpoint.card import may_replace
from peft_sparse.checkpoint.save import save_sparse

# Of an earlier push: other shards, but not all files whose names begin alike; and dense weights, which plain
# transformers would load in place of these.
_SHARDS = [
    f"sparse_model{ending}" for ending in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")
]
_STALE = [*_SHARDS, "model*.safetensors", "model.safetensors.index.json", "pytorch_model*"]


def push_sparse_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload sparse model",
    create_pr: bool = False,
    **save: Any,
) -> str:
    """Save a model with [`save_sparse`] and upload it in one commit, which also removes weights of earlier ones.

    The model card is part of it, unless the repository has one that somebody wrote.

    Args:
        model: as [`save_sparse`] takes it.
        repo_id: such as "owner/name"; made if it is not there.
        private: whether a repository that is made is private; None: as the owner's settings say.
        token: for the Hub; None: the one of `hf auth login`.
        revision: the branch; None: the main one.
        commit_message: of the commit.
        create_pr: open a pull request with it.
        **save: `max_shard_size`, `tokenizer`, `base_model` and `method` for [`save_sparse`].

    Returns:
        The address of the commit.

    Raises:
        ValueError: as [`save_sparse`] does; nothing has been sent then.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_sparse(model, folder, **save)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=_STALE,
            ignore_patterns=["README.md"] if has_own_card(api, repo_id, revision) else None,
        )
    return str(commit.commit_url)


def has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has a card that somebody wrote."""
    try:
        card = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    return not may_replace(Path(card))
