"""Models to files and back: packed checkpoints, as small as the weights that are not zero, and their cards."""

from peft_sparse.checkpoint.adapter_card import write_adapter_card
from peft_sparse.checkpoint.card import write_model_card
from peft_sparse.checkpoint.convert import Converted, merge_checkpoint, pack_checkpoint, unpack_checkpoint
from peft_sparse.checkpoint.hub import push_sparse_to_hub
from peft_sparse.checkpoint.load import load_sparse
from peft_sparse.checkpoint.merged import write_card_when_saved
from peft_sparse.checkpoint.models import load_model
from peft_sparse.checkpoint.prune import prune_checkpoint
from peft_sparse.checkpoint.save import save_sparse

__all__ = [
    "Converted",
    "load_model",
    "load_sparse",
    "merge_checkpoint",
    "pack_checkpoint",
    "prune_checkpoint",
    "push_sparse_to_hub",
    "save_sparse",
    "unpack_checkpoint",
    "write_adapter_card",
    "write_card_when_saved",
    "write_model_card",
]
