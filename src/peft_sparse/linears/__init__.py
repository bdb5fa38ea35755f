"""How a module stores its weight, and which linears a model's transformer blocks have.

The rest of the package sees every weight as (out_features, in_features). This is the one place that knows that
transformers' Conv1D, GPT-2's linear, stores the transpose, where a linear is packed: stored without its zeros, or
quantised by bitsandbytes, or accelerated: computing with another form of its weight, and where accelerate keeps it.
"""

from peft_sparse.linears.accelerated import (
    Acceleration,
    acceleration_of,
    install,
    refuses_acceleration,
    uninstall,
)
from peft_sparse.linears.blocks import (
    BlockList,
    Names,
    block_experts,
    block_linear_names,
    block_linears,
    check_model,
    find_block_lists,
    is_router,
    linears_inside,
    matches,
    names_in_blocks,
    select_linears,
)
from peft_sparse.linears.callers import linears_not_called
from peft_sparse.linears.dense import warn_of_dense_parameters
from peft_sparse.linears.hooks import (
    call_as,
    device_of,
    has_hooks,
    keep_loaded,
    offload_hook,
    temporary_forward,
    weights_loaded,
)
from peft_sparse.linears.offloaded import holder_of, stored_state, unprefixed
from peft_sparse.linears.operands import OPERANDS, Operand
from peft_sparse.linears.pack import pack_model, packable_linears, replace_module, unpack_model
from peft_sparse.linears.packed import PackedLinear
from peft_sparse.linears.quantize import check_float, dequantize_model, quantize_model
from peft_sparse.linears.quantized import (
    bits,
    compute_dtype,
    copy_of,
    dequantized_linear,
    is_foreign,
    not_read,
    quantized_weight,
    write_quantized,
)
from peft_sparse.linears.saving import (
    allow_save_pretrained,
    check_saves_unpacked,
    is_packed,
    refuse_save_pretrained,
)
from peft_sparse.linears.sharded import gathered, is_dtensor, is_share, reshard, whole_parameter, zero_gathered
from peft_sparse.linears.sharing import several_places, shared_weights, storage_key
from peft_sparse.linears.weights import (
    as_stored,
    check_own_weight,
    computes_linear,
    forward_replaced,
    get_weight,
    in_out_features,
    is_linear,
    num_zeros,
    plain_class,
    set_weight,
    stored_weight,
    unwrap,
    weight_parameter,
    writable,
)

__all__ = [
    "OPERANDS",
    "Acceleration",
    "BlockList",
    "Names",
    "Operand",
    "PackedLinear",
    "acceleration_of",
    "allow_save_pretrained",
    "as_stored",
    "bits",
    "block_experts",
    "block_linear_names",
    "block_linears",
    "call_as",
    "check_float",
    "check_model",
    "check_own_weight",
    "check_saves_unpacked",
    "compute_dtype",
    "computes_linear",
    "copy_of",
    "dequantize_model",
    "dequantized_linear",
    "device_of",
    "find_block_lists",
    "forward_replaced",
    "gathered",
    "get_weight",
    "has_hooks",
    "holder_of",
    "in_out_features",
    "install",
    "is_dtensor",
    "is_foreign",
    "is_linear",
    "is_packed",
    "is_router",
    "is_share",
    "keep_loaded",
    "linears_inside",
    "linears_not_called",
    "matches",
    "names_in_blocks",
    "not_read",
    "num_zeros",
    "offload_hook",
    "pack_model",
    "packable_linears",
    "plain_class",
    "quantize_model",
    "quantized_weight",
    "refuse_save_pretrained",
    "refuses_acceleration",
    "replace_module",
    "reshard",
    "select_linears",
    "set_weight",
    "several_places",
    "shared_weights",
    "storage_key",
    "stored_state",
    "stored_weight",
    "temporary_forward",
    "uninstall",
    "unpack_model",
    "unprefixed",
    "unwrap",
    "warn_of_dense_parameters",
    "weight_parameter",
    "weights_loaded",
    "whole_parameter",
    "writable",
    "write_quantized",
    "zero_gathered",
]
