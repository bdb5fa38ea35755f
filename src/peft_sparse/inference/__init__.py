"""Running a pruned model: each layer computed in the way that is the fastest for it, which is measured."""

from peft_sparse.inference.accelerate import accelerate_sparse, remove_acceleration
from peft_sparse.inference.report import AccelerationReport, LayerChoice, TokenChoice

__all__ = ["AccelerationReport", "LayerChoice", "TokenChoice", "accelerate_sparse", "remove_acceleration"]
