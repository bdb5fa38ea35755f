"""Before a merge: is it exact, and how exact is it where it cannot be?

The merged weight has to have the zeros of the forward, and its function. A quantised base model holds merged weights
only to the rounding of its codes; what that loses is added up over its layers and said.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from peft_sparse import ops
from peft_sparse.linears import bits, copy_of, quantized_weight, shared_weights, weight_parameter
from peft_sparse.sparsity import Weight, dense_weight, round_keeping_support, weight_entries, with_entries

# Largest relative difference between the outputs of the adapted and of the merged layer that rounding explains.
# float32 allows for TF32 matmuls.
MERGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
PROBE_ROWS = 4


def merged_into(layer: Any, weight: Weight, adapter_names: list[str]) -> Weight:
    """Adapters of a layer merged into a weight in order, checked; nothing is written. As in the forward, each starts
    from what the one before it makes, and the last one's is rounded: PST would select another mask from less.

    Raises:
        ValueError, RuntimeError: see [`SparseLayer.merged_weight`].
    """
    dtype = weight.dtype
    for adapter_name in adapter_names:
        before, weight = weight, layer.effective_weight(adapter_name, weight)
        check_finite(weight_entries(weight), before, adapter_name, layer.module_name)
    if not adapter_names:
        return weight
    support = layer.support(adapter_name, before)
    entries = round_keeping_support(weight_entries(weight), support, dtype)
    check_finite(entries, before, adapter_name, layer.module_name)  # half precision holds less
    merged = with_entries(weight, entries)
    check_merge(layer, merged, support, before, adapter_name)
    return merged


def rounded_to(dtype: torch.dtype, merged: torch.Tensor, module_name: str) -> torch.Tensor:
    """A merged weight in another dtype, with the same zeros.

    Raises:
        ValueError: if the dtype cannot hold a weight.
    """
    rounded = round_keeping_support(merged, merged != 0, dtype)
    if not rounded.isfinite().all():
        raise ValueError(
            f"Weights of {dtype} are below {torch.finfo(dtype).max:g}, got {float(merged.abs().max()):g} in "
            f"`{module_name}`; take torch.bfloat16. Nothing was merged."
        )
    return rounded


def copy_to_restore(base_layer: nn.Module, own: torch.Tensor) -> Any:
    """What unmerging puts back into a base layer whose weight is whole now.

    Args:
        own: what this process has of that weight at other times.
    """
    if bits(base_layer) is not None:
        return copy_of(quantized_weight(base_layer))
    whole = weight_parameter(base_layer).detach()
    # FSDP2's share of it is enough; ZeRO-3 has none that could be kept in this way
    return (own if own.shape == whole.shape else whole).clone()


def check_finite(merged: torch.Tensor, weight: Weight, adapter_name: str, module_name: str) -> None:
    """Raises:
    ValueError: if a merged weight holds NaN or infinity, be it from the adapter or from the weight under it."""
    if merged.isfinite().all():
        return
    before = weight_entries(weight)
    if not before.isfinite().all():
        raise ValueError(
            f"NaNs detected in the base weight. Merging needs finite weights, got {_not_finite(before)} in "
            f"`{module_name}` without the adapter {adapter_name}; load a sound base model. Nothing was merged."
        )
    raise ValueError(
        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: merging needs "
        f"finite weights, got {_not_finite(merged)} in `{module_name}`; train with a lower learning rate, or load an "
        "earlier checkpoint. Nothing was merged."
    )


def _not_finite(entries: torch.Tensor) -> str:
    return f"{int((~entries.isfinite()).sum())} NaN or infinite ones of {entries.numel()}"


def check_merge(layer: Any, merged: Weight, support: torch.Tensor, weight: Weight, adapter_name: str) -> None:
    """Compare a merged weight with the forward of its layer.

    Args:
        layer: a SparseLayer.
        merged: what would be written.
        support: where the forward's weight is not zero.
        weight: the base weight of that forward.

    Raises:
        RuntimeError: if zeros or outputs differ.
    """
    entries = weight_entries(merged)
    moved = int(((entries != 0) != support).sum())
    if moved:
        raise RuntimeError(
            f"Merging keeps every zero of the forward, got {moved} that differ in `{layer.module_name}` (adapter "
            f"{adapter_name}). Nothing was merged; please report this with your config."
        )
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    probe = torch.randn(PROBE_ROWS, layer.in_features, generator=generator, device="cpu").to(entries)
    with torch.autocast(device_type=entries.device.type, enabled=False):
        expected = layer.adapted_linear(probe, weight, None, adapter_name).double()
        difference = (ops.packed_linear(probe, merged, None).double() - expected).norm()
    tolerance = MERGE_TOLERANCE[entries.dtype]
    if not difference <= tolerance * expected.norm().clamp_min(torch.finfo(entries.dtype).tiny):
        raise RuntimeError(
            f"Merging keeps the layer's function, got outputs that differ by {difference / expected.norm():.1e} "
            f"(relative; at most {tolerance:.0e} is rounding) in `{layer.module_name}` (adapter {adapter_name}). "
            "Nothing was merged; please report this with your config."
        )


def check_not_merged(layer: Any, adapter_name: str, doing: str) -> None:
    """Raises:
    ValueError: if the adapter is merged into a layer. It starts with `doing`, such as "A sparsity schedule drives"."""
    if adapter_name in layer.merged_adapters:
        raise ValueError(
            f"{doing} adapters that are not merged, got '{adapter_name}' merged into `{layer.module_name}`, whose "
            "weight would stay as it is; call `unmerge_adapter()` first."
        )


class RoundingErrors:
    """||W_kept - W|| / ||W|| and max |W_kept - W| of merged weights W, of each layer and of all together."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}  # relative error by layer
        self.largest = 0.0
        self._squares, self._norm = 0.0, 0.0

    def add(self, name: str, merged: Weight, kept: Weight) -> None:
        """Count one layer, unless it keeps the very weight.

        Args:
            merged: (out, in), as the adapters make it.
            kept: (out, in), as it is stored.
        """
        if kept is merged:
            return
        merged = dense_weight(merged)
        difference = dense_weight(kept).to(merged.dtype) - merged
        squares, norm = float(difference.square().sum()), float(merged.square().sum())
        self._squares, self._norm = self._squares + squares, self._norm + norm
        self.largest = max(self.largest, float(difference.abs().max()))
        self.worst[name] = math.sqrt(squares / norm) if norm else 0.0

    @property
    def relative(self) -> float:
        """||W_kept - W|| / ||W|| over all layers."""
        return math.sqrt(self._squares / self._norm) if self._norm else 0.0

    def warn(self, dtype: torch.dtype | None) -> None:
        """State the error, if there is one.

        Args:
            dtype: of dense weights; None: they were quantised again.
        """
        if not self.worst:
            return
        name = max(self.worst, key=lambda name: self.worst[name])
        layers, outputs = f"{len(self.worst)} quantised layers", "so that outputs may differ"
        how = f"quantises {layers} again" if dtype is None else f"rounds {layers} to {dtype}"
        way_out = "; `merge_and_unload(dequantize_to=torch.bfloat16)` loses less" if dtype is None else ""
        warnings.warn(
            f"Merging {how}, {outputs}: relative error of the weights {self.relative:.2%} (worst layer `{name}`: "
            f"{self.worst[name]:.2%}), largest error of one weight {self.largest:.2g}. No zero moves{way_out}.",
            stacklevel=4,
        )


def warn_of_untrained(names: list[str]) -> None:
    """Warn of layers that a merge prunes though training has not reached their adapters, while it reached others."""
    if names:
        warnings.warn(
            f"Merging keeps what a model computes where its adapters are called, got `{names[0]}` ({len(names)} in "
            "all), which prunes but learned nothing while others did: if training never ran it or had no use for it, "
            "all is well; if another module computes with its weight without calling it, the merged model is another "
            "one. Compare outputs, or leave it out with `exclude_modules`.",
            stacklevel=5,
        )


def keep_tied(model: Any) -> None:
    """Have a config say again that the head is tied, where PEFT said that it is not: it compares it with the input
    embeddings, and in an encoder-decoder with two vocabularies they are the encoder's. A head that the config calls
    untied would not be loaded from the decoder's, with which it is saved."""
    if model.config.tie_word_embeddings:
        return
    if model.get_output_embeddings() in shared_weights(model):
        model.config.tie_word_embeddings = True
        return
    warnings.warn(
        "A head is tied to the embeddings while they share a weight, got two after this merge: "
        "`config.tie_word_embeddings` is False now.",
        stacklevel=4,
    )
    _separate_what_is_not_tied(model)


def _separate_what_is_not_tied(model: Any) -> None:
    """Give modules that only the config tied, as BART's encoder and decoder to the embeddings, weights of their own:
    what several have in common is saved once, and loaded it would be that of one, and random numbers in the others."""
    with torch.device("meta"):
        new = type(model)._from_config(model.config)
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        weight = model.get_parameter(name)
        tied = weight is model.get_parameter(other)
        if tied and not weight.is_meta and new.get_parameter(name) is not new.get_parameter(other):
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, nn.Parameter(weight.detach().clone(), weight.requires_grad))
