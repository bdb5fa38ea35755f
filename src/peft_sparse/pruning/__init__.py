"""From dense to sparse: pruners, which change a model in place and hand it back."""

from peft_sparse.pruning.magnitude import prune_magnitude
from peft_sparse.pruning.wanda import prune_wanda

__all__ = ["prune_magnitude", "prune_wanda"]
