"""How weights lie in files: plain safetensors, our packed format v1, and the two sparse layouts of compressed-tensors.

Reading only, one tensor at a time, and knowing no more of a model than the names of its tensors, which of them are
linears, and what its config tells about it. Writing files, and turning them into models, is `checkpoint/`.
"""

from peft_sparse.storage.companions import belongs_to_tokenizer, companions
from peft_sparse.storage.folders import locate, locate_companions, may_be_on_the_hub
from peft_sparse.storage.model import StoredLinear, StoredModel, open_model
from peft_sparse.storage.names import as_in_files, names_in_model, without_place
from peft_sparse.storage.origin import CONFIG_KEY, PRUNING, facts_of, own_name, record_facts
from peft_sparse.storage.tensors import StoredTensor

__all__ = [
    "CONFIG_KEY",
    "PRUNING",
    "StoredLinear",
    "StoredModel",
    "StoredTensor",
    "as_in_files",
    "belongs_to_tokenizer",
    "companions",
    "facts_of",
    "locate",
    "locate_companions",
    "may_be_on_the_hub",
    "names_in_model",
    "open_model",
    "own_name",
    "record_facts",
    "without_place",
]
