"""How weights lie in files: plain safetensors, our packed format v1, and the two sparse layouts of compressed-tensors.

Reading only, one tensor at a time, and knowing no more of a model than the names of its tensors and which of them are
linears. Writing files, and turning them into models, is `checkpoint/`.
"""

from peft_sparse.storage.folders import locate
from peft_sparse.storage.format import CONFIG_KEY, PRUNING
from peft_sparse.storage.model import StoredModel, open_model
from peft_sparse.storage.tensors import StoredTensor

__all__ = ["CONFIG_KEY", "PRUNING", "StoredModel", "StoredTensor", "locate", "open_model"]
