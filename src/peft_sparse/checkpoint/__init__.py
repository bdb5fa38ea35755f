"""Models to files and back: packed checkpoints, as small as the weights that are not zero, and their cards."""

from peft_sparse.checkpoint.card import write_model_card
from peft_sparse.checkpoint.hub import push_sparse_to_hub
from peft_sparse.checkpoint.load import load_sparse
from peft_sparse.checkpoint.merged import write_card_when_saved
from peft_sparse.checkpoint.save import save_sparse

__all__ = ["load_sparse", "push_sparse_to_hub", "save_sparse", "write_card_when_saved", "write_model_card"]
