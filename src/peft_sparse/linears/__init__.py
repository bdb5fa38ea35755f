"""How a module stores its weight, and which linears a model's transformer blocks have.

The rest of the package sees every weight as (out_features, in_features). This is the one place that knows that
transformers' Conv1D, GPT-2's linear, stores the transpose, and where a linear is packed: stored without its zeros.
"""

from peft_sparse.linears.blocks import (
    BlockList,
    Names,
    block_experts,
    block_linear_names,
    block_linears,
    find_block_lists,
    linears_inside,
    matches,
)
from peft_sparse.linears.pack import pack_model, unpack_model
from peft_sparse.linears.packed import PackedLinear
from peft_sparse.linears.saving import check_saves_unpacked, refuse_save_pretrained
from peft_sparse.linears.weights import (
    as_stored,
    get_weight,
    in_out_features,
    is_linear,
    num_zeros,
    set_weight,
    stored_weight,
    unwrap,
    weight_parameter,
)

__all__ = [
    "BlockList",
    "Names",
    "PackedLinear",
    "as_stored",
    "block_experts",
    "block_linear_names",
    "block_linears",
    "check_saves_unpacked",
    "find_block_lists",
    "get_weight",
    "in_out_features",
    "is_linear",
    "linears_inside",
    "matches",
    "num_zeros",
    "pack_model",
    "refuse_save_pretrained",
    "set_weight",
    "stored_weight",
    "unpack_model",
    "unwrap",
    "weight_parameter",
]
