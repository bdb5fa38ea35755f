"""The maths: tensors and numbers in, tensors and numbers out. Nothing here knows a module, PEFT or a file."""

from peft_sparse.sparsity.budgets import (
    LayerSize,
    check_sparsity_mapping,
    matching_key,
    owl_sparsities,
    sparsities_by_name,
    uniform_sparsities,
)
from peft_sparse.sparsity.csr import CsrMatrix, csr_from_lists, csr_tensor, to_csr
from peft_sparse.sparsity.forms import (
    PackedWeight,
    Weight,
    dense_weight,
    put_together,
    take_apart,
    weight_entries,
    with_entries,
    write_rows,
)
from peft_sparse.sparsity.importance import magnitude_importance, pst_importance, ria_importance, wanda_importance
from peft_sparse.sparsity.masks import round_keeping_support, select_mask, select_mask_in_graph
from peft_sparse.sparsity.packing import (
    pack_mask,
    pack_values,
    packed_fault,
    row_starts,
    unpack_after_zero,
    unpack_mask,
    unpack_values,
)
from peft_sparse.sparsity.patterns import (
    NM,
    Pattern,
    Unstructured,
    check_sparsity,
    find_pattern,
    is_finite_number,
    parse_pattern,
    pattern_with_group,
)
from peft_sparse.sparsity.quantized import EightBitWeight, FourBitWeight, QuantizedWeight, lost_blocks, quantize_like
from peft_sparse.sparsity.reconstruction import InputFactor, factorize_, fit_block_size, prune_and_reconstruct
from peft_sparse.sparsity.schedules import SCHEDULES, sparsity_at
from peft_sparse.sparsity.sketch import OutputSketch
from peft_sparse.sparsity.statistics import ColumnNorms, Hessian

__all__ = [
    "NM",
    "SCHEDULES",
    "ColumnNorms",
    "CsrMatrix",
    "EightBitWeight",
    "FourBitWeight",
    "Hessian",
    "InputFactor",
    "LayerSize",
    "OutputSketch",
    "PackedWeight",
    "Pattern",
    "QuantizedWeight",
    "Unstructured",
    "Weight",
    "check_sparsity",
    "check_sparsity_mapping",
    "csr_from_lists",
    "csr_tensor",
    "dense_weight",
    "factorize_",
    "find_pattern",
    "fit_block_size",
    "is_finite_number",
    "lost_blocks",
    "magnitude_importance",
    "matching_key",
    "owl_sparsities",
    "pack_mask",
    "pack_values",
    "packed_fault",
    "parse_pattern",
    "pattern_with_group",
    "prune_and_reconstruct",
    "pst_importance",
    "put_together",
    "quantize_like",
    "ria_importance",
    "round_keeping_support",
    "row_starts",
    "select_mask",
    "select_mask_in_graph",
    "sparsities_by_name",
    "sparsity_at",
    "take_apart",
    "to_csr",
    "uniform_sparsities",
    "unpack_after_zero",
    "unpack_mask",
    "unpack_values",
    "wanda_importance",
    "weight_entries",
    "with_entries",
    "write_rows",
]
