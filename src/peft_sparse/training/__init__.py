"""What happens as training steps go by: the sparsity schedule, learning rates of their own for scores, and checkpoints
that a killed run can trust."""

from peft_sparse.training.callbacks import CheckpointCallback, SparsityCallback
from peft_sparse.training.checkpoints import last_complete_checkpoint
from peft_sparse.training.param_groups import pst_param_groups

__all__ = ["CheckpointCallback", "SparsityCallback", "last_complete_checkpoint", "pst_param_groups"]
