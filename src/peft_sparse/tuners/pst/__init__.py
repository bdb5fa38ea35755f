"""PST, sparsifying a model while fine-tuning it (arXiv 2205.11005). Importing this registers it with PEFT."""

from peft_sparse._peft import register
from peft_sparse.tuners.pst.config import PstConfig
from peft_sparse.tuners.pst.layer import PstLinear
from peft_sparse.tuners.pst.model import PstModel, driven_adapters, set_sparsity_step

__all__ = ["PstConfig", "PstLinear", "PstModel", "driven_adapters", "set_sparsity_step"]

register(name="pst", config_cls=PstConfig, model_cls=PstModel)
