"""How a module stores its weight, and which linears a model's transformer blocks have.

The rest of the package sees every weight as (out_features, in_features). This is the one place that knows that
transformers' Conv1D, GPT-2's linear, stores the transpose, and where a linear is packed: stored without its zeros.
"""

from peft_sparse.linears.blocks import (
    BlockList,
    Names,
    block_linear_names,
    block_linears,
    find_block_lists,
    linears_inside,
    matches,
)
from peft_sparse.linears.pack import pack_model, refuse_save_pretrained, unpack_model
from peft_sparse.linears.packed import PackedLinear
from peft_sparse.linears.sharded import gathered, is_dtensor, is_share, reshard, whole_parameter
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
    "block_linear_names",
    "block_linears",
    "find_block_lists",
    "gathered",
    "get_weight",
    "in_out_features",
    "is_dtensor",
    "is_linear",
    "is_share",
    "linears_inside",
    "matches",
    "num_zeros",
    "pack_model",
    "refuse_save_pretrained",
    "reshard",
    "set_weight",
    "stored_weight",
    "unpack_model",
    "unwrap",
    "weight_parameter",
    "whole_parameter",
]
