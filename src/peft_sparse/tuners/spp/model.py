"""SPP's model: places [`SppLinear`] layers, and tells whether the base model has zeros to keep."""

from __future__ import annotations

import math
import os
import warnings

from torch import nn

from peft_sparse.linears import (
    bits,
    block_linears,
    in_out_features,
    num_zeros,
    quantized_weight,
    unwrap,
    weight_parameter,
)
from peft_sparse.sparsity import FourBitWeight, lost_blocks
from peft_sparse.tuners.sparse_config import SparseConfig
from peft_sparse.tuners.sparse_model import SparseTuner
from peft_sparse.tuners.spp.layer import SppLinear

# A pruned weight has far more zeros; a dense one has a few by chance, most in half precision.
DENSE_BELOW = 0.01
_PRUNE_FIRST = "prune the model first, for example with `peft_sparse.prune_wanda`"
_LOADED_ELSEWHERE = (
    "load the adapter onto the pruned model that it was trained on (an adapter names the folder of its base: save one "
    "that is pruned in memory with `save_pretrained` and load it from there, before it gets an adapter)"
)


class SppModel(SparseTuner):
    """Tunes an already pruned model so that its zeros survive training and merging (arXiv 2405.16057).

    Made by `get_peft_model(model, SppConfig())`. Warns if target layers are dense: their weights would only be
    rescaled.
    """

    prefix: str = "spp_"
    tuner_layer_cls = SppLinear
    _linears = (
        "torch.nn.Linear, transformers' Conv1D and PackedLinear with floating point weights, and Linear4bit and "
        "Linear8bitLt of bitsandbytes with quantised ones"
    )

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if not peft_config.awaits_weights:  # else they have been trained
            _warn_of_trained_whole(peft_config.names_found, model)

    def _check_targets(self, targets: dict[str, nn.Module], peft_config: SparseConfig) -> None:
        linears = {name: unwrap(module) for name, module in targets.items()}
        dense = [
            name for name, linear in linears.items() if not weight_parameter(linear).is_meta and not _is_pruned(linear)
        ]
        if dense and int(os.environ.get("RANK", 0)) == 0:  # the others may not have loaded the weights yet
            way_out = _LOADED_ELSEWHERE if peft_config.awaits_weights else _PRUNE_FIRST
            warnings.warn(
                f"SPP tunes a model that is already pruned and keeps its zeros, but {len(dense)} of {len(targets)} "
                f"target layers have fewer than {DENSE_BELOW:.0%} zeros (the first is `{dense[0]}`). They would be "
                f"rescaled and stay dense; {way_out}.",
                stacklevel=2,
            )
        quantized = {name: linear for name, linear in linears.items() if bits(linear) is not None}
        _warn_about_quantized({n: m for n, m in quantized.items() if not weight_parameter(m).is_meta})


def _is_pruned(linear: nn.Module) -> bool:
    return num_zeros(linear) >= DENSE_BELOW * math.prod(in_out_features(linear))


def _warn_of_trained_whole(names: tuple[str, ...], model: nn.Module) -> None:
    """Where `modules_to_save` names modules with pruned linears: PEFT trains a copy of them, zeros included. (A head
    has zeros too, if it is tied to embeddings with a padding token.)"""
    whole = tuple(f"{name}." for name, _ in model.named_modules() if name.endswith(names))
    pruned = [
        name
        for name, linear in block_linears(model).items()
        if f"{name}.".startswith(whole) and not weight_parameter(unwrap(linear)).is_meta and _is_pruned(unwrap(linear))
    ]
    if pruned and int(os.environ.get("RANK", 0)) == 0:
        warnings.warn(
            "SPP keeps the zeros of the linears that it adapts, but `modules_to_save` trains "
            f"{len(pruned)} pruned ones whole (the first is `{pruned[0]}`), and the first step fills their zeros; to "
            "keep them, leave those modules out of `modules_to_save`.",
            stacklevel=2,
        )


def _warn_about_quantized(linears: dict[str, nn.Module]) -> None:
    """Where bitsandbytes itself is known to lose zeros, or to read a weight wrongly."""
    weights = {name: quantized_weight(linear) for name, linear in linears.items()}
    lost = {name: count for name, weight in weights.items() if (count := lost_blocks(weight))}
    if lost:
        warnings.warn(
            f"Quantising keeps zeros, but {sum(lost.values())} blocks in {len(lost)} layers (the first is "
            f"`{next(iter(lost))}`) look like blocks of zeros that bitsandbytes lost: on CUDA it stores them as NF4's "
            "lowest code, which double quantisation makes a small number. Quantise with "
            "`peft_sparse.quantize_model(pruned_model)`, or with `bnb_4bit_use_double_quant=False`, and compare with "
            "`peft_sparse.verify_sparsity(model, reference=pruned_model)`.",
            stacklevel=2,
        )
    misread = [
        name
        for name, weight in weights.items()
        if isinstance(weight, FourBitWeight)
        and weight.codes.device.type == "cpu"
        and weight.shape[1] % weight.block_size
        and weight.shape[1] % 2 == 0
    ]
    if misread:
        warnings.warn(
            f"bitsandbytes reads 4-bit weights on a CPU by whole rows, and gets those of {len(misread)} layers wrong, "
            f"whose in_features its block size does not divide (the first is `{misread[0]}`, "
            f"{weights[misread[0]].shape[1]}). With the adapter they are right, without it (disabled, or merged and "
            "quantised again) they are not: use `merge_and_unload(dequantize_to=...)`, 8 bits, or a GPU.",
            stacklevel=2,
        )
