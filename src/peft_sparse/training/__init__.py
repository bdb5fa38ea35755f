"""What happens as training steps go by: the sparsity schedule, and learning rates of their own for scores."""

from peft_sparse.training.callbacks import SparsityCallback
from peft_sparse.training.param_groups import pst_param_groups

__all__ = ["SparsityCallback", "pst_param_groups"]
