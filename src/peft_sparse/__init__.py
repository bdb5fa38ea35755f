"""Sparse language models with PEFT: prune -> tune -> merge -> verify -> store -> run, every zero kept.

Importing this package registers two methods with PEFT: PST (`PstConfig`), which sparsifies a model while fine-tuning
it, and SPP (`SppConfig`), which fine-tunes a pruned model so that its zeros survive. Saved adapters of these two are
looked at before PEFT or transformers read their weights; nothing else of PEFT and transformers is changed.
"""

from importlib.metadata import version

from peft_sparse.checkpoint import load_sparse, push_sparse_to_hub, save_sparse, write_model_card
from peft_sparse.evaluation import (
    SparsityReport,
    VerifyReport,
    perplexity,
    plot_schedule,
    plot_sparsity,
    sparsity_report,
    verify_sparsity,
)
from peft_sparse.inference import AccelerationReport, accelerate_sparse, remove_acceleration
from peft_sparse.linears import dequantize_model, pack_model, quantize_model, unpack_model
from peft_sparse.pruning import (
    calibration_batches,
    owl_sparsity,
    prune_magnitude,
    prune_ria,
    prune_sparsegpt,
    prune_wanda,
    uniform_sparsity,
)
from peft_sparse.training import (
    CheckpointCallback,
    DistillationCallback,
    SparsityCallback,
    distill,
    finetune,
    last_complete_checkpoint,
    load_recipe,
    pst_param_groups,
)
from peft_sparse.tuners.pst import PstConfig, PstModel
from peft_sparse.tuners.spp import SppConfig, SppModel

__all__ = [
    "AccelerationReport",
    "CheckpointCallback",
    "DistillationCallback",
    "PstConfig",
    "PstModel",
    "SparsityCallback",
    "SparsityReport",
    "SppConfig",
    "SppModel",
    "VerifyReport",
    "__version__",
    "accelerate_sparse",
    "calibration_batches",
    "dequantize_model",
    "distill",
    "finetune",
    "last_complete_checkpoint",
    "load_recipe",
    "load_sparse",
    "owl_sparsity",
    "pack_model",
    "perplexity",
    "plot_schedule",
    "plot_sparsity",
    "prune_magnitude",
    "prune_ria",
    "prune_sparsegpt",
    "prune_wanda",
    "pst_param_groups",
    "push_sparse_to_hub",
    "quantize_model",
    "remove_acceleration",
    "save_sparse",
    "sparsity_report",
    "uniform_sparsity",
    "unpack_model",
    "verify_sparsity",
    "write_model_card",
]

__version__ = version("peft-sparse")
