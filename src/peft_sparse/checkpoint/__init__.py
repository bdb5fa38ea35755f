"""Models to files and back: packed checkpoints, which have the size of the weights that are not zero."""

from peft_sparse.checkpoint.load import load_sparse
from peft_sparse.checkpoint.save import save_sparse

__all__ = ["load_sparse", "save_sparse"]
