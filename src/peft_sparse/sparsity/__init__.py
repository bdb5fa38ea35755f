"""The maths: tensors and numbers in, tensors and numbers out. Nothing here knows a module, PEFT or a file."""

from peft_sparse.sparsity.csr import CsrMatrix, to_csr
from peft_sparse.sparsity.importance import magnitude_importance, pst_importance, wanda_importance
from peft_sparse.sparsity.masks import round_keeping_support, select_mask
from peft_sparse.sparsity.packing import (
    PackedWeight,
    Weight,
    dense_weight,
    pack_mask,
    pack_values,
    row_starts,
    unpack_mask,
    unpack_values,
    weight_entries,
    with_entries,
    write_rows,
)
from peft_sparse.sparsity.patterns import NM, Pattern, Unstructured, check_sparsity, find_pattern, parse_pattern
from peft_sparse.sparsity.schedules import SCHEDULES, sparsity_at
from peft_sparse.sparsity.statistics import ColumnNorms

__all__ = [
    "NM",
    "SCHEDULES",
    "ColumnNorms",
    "CsrMatrix",
    "PackedWeight",
    "Pattern",
    "Unstructured",
    "Weight",
    "check_sparsity",
    "dense_weight",
    "find_pattern",
    "magnitude_importance",
    "pack_mask",
    "pack_values",
    "parse_pattern",
    "pst_importance",
    "round_keeping_support",
    "row_starts",
    "select_mask",
    "sparsity_at",
    "to_csr",
    "unpack_mask",
    "unpack_values",
    "wanda_importance",
    "weight_entries",
    "with_entries",
    "write_rows",
]
