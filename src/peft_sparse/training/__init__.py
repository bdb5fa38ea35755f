"""What happens as training steps go by: recipes, the sparsity schedule, learning rates of their own for scores, and
checkpoints that a killed run can trust."""

from peft_sparse.training.callbacks import DistillationCallback, SparsityCallback, log_before_reporters
from peft_sparse.training.checkpoint_callback import CheckpointCallback
from peft_sparse.training.checkpoints import last_complete_checkpoint
from peft_sparse.training.distillation import distill
from peft_sparse.training.evaluate import evaluate_model, evaluate_recipe
from peft_sparse.training.finetune import finetune, plan_finetune
from peft_sparse.training.param_groups import pst_param_groups
from peft_sparse.training.recipe import Recipe, load_recipe, make_recipe
from peft_sparse.training.result import FinetuneResult

__all__ = [
    "CheckpointCallback",
    "DistillationCallback",
    "FinetuneResult",
    "Recipe",
    "SparsityCallback",
    "distill",
    "evaluate_model",
    "evaluate_recipe",
    "finetune",
    "last_complete_checkpoint",
    "load_recipe",
    "log_before_reporters",
    "make_recipe",
    "plan_finetune",
    "pst_param_groups",
]
