"""SPP, fine-tuning that keeps the zeros of a pruned model (arXiv 2405.16057). Importing this registers it with
PEFT."""

from peft_sparse._peft import register
from peft_sparse.tuners.spp.config import SppConfig
from peft_sparse.tuners.spp.layer import SppLinear
from peft_sparse.tuners.spp.model import SppModel

__all__ = ["SppConfig", "SppLinear", "SppModel"]

register(name="spp", config_cls=SppConfig, model_cls=SppModel)
