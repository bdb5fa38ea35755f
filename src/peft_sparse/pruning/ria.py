"""RIA: weights go whose share of their row and column, times the norm of their input, is smallest (Zhang et al., ICLR
2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models").

    S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a,   a = 1/2,   compared within the layer

X_j is the j-th input column over all calibration tokens. Blocks are pruned in order, and each one sees the activations
of the pruned blocks before it. No weight that stays is changed. The paper's other part, a permutation of channels
before N:M pruning, is not here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from peft_sparse.linears import get_weight
from peft_sparse.pruning.run import plan_run
from peft_sparse.pruning.statistics import empty_norms
from peft_sparse.pruning.targets import Names, prune_by_scores
from peft_sparse.sparsity import ColumnNorms, Pattern, is_finite_number, pattern_with_group, ria_importance

Model = TypeVar("Model", bound=nn.Module)


def prune_ria(
    model: Model,
    batches: Iterable[Mapping[str, torch.Tensor]],
    pattern: str | Pattern = "unstructured",
    sparsity: float | Mapping[str, float] | None = None,
    *,
    group: str | None = None,
    exponent: float = 0.5,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    measure_error: bool = False,
    progress: bool = True,
) -> Model:
    """Zero the weights of smallest relative importance and activation, in place.

    All weights of a layer compete with each other, or the M weights of each group for an N:M pattern. Every layer has
    exactly `int(sparsity * numel)` zeros afterwards, or those that it had where these are more; of equal scores
    those with the lower index go first.

    Args:
        model: with repeated transformer blocks. By default all their linear layers are pruned except routers and gates
            of experts and, with a warning, those that are not called; never embeddings, pooler or head. Its weights
            may be kept in CPU memory or on disk by accelerate's hooks.
        batches: calibration data, dicts of tensors as the model's forward takes them (`input_ids`, `attention_mask`,
            ...): a list, a DataLoader, a generator, a tokenized `datasets` dataset; see [`calibration_batches`].
            Tokens that `attention_mask` marks as padding do not count.
        pattern: `"unstructured"` or `"N:M"`, N weights kept of every M consecutive ones along in_features.
        sparsity: share of zeros in [0, 1); None: 0.5. An N:M pattern fixes it at 1 - N/M; another value is an error. A
            mapping from full names, ends of names or regexes, such as [`owl_sparsity`] returns, sets it by layer.
        group: what competes: `"layer"`, all weights of a layer (None, the default of the authors' code), or `"row"`,
            those of one output, each with `int(sparsity * in_features)` zeros. Not for N:M.
        exponent: a, of the activations' norm; at least 0.
        target_modules: linear layers to prune instead of all: names or their last parts, or one regex for full names,
            as in PEFT; inside the blocks.
        exclude_modules: linear layers to leave alone, given in the same way.
        checkpoint_dir, device, measure_error: as in [`prune_wanda`].
        progress: show a bar over the blocks.

    Returns:
        `model` itself, in the mode (training or evaluation) in which it came, with what was done in its config as
        after [`prune_wanda`].

    Raises:
        ValueError: for a malformed pattern, sparsity, group or exponent; for an empty calibration set or one whose
            activations hold NaN or infinity, or sequences longer than the model's context; if in_features of a target
            is not divisible by M; if a target gets no input; if a score overflows. After any error, a keyboard
            interrupt included, the model is as it was.

    Memory:
        As for `prune_wanda`.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> batches = [{"input_ids": torch.randint(0, 8, (2, 6))} for _ in range(4)]
        >>> model = prune_ria(LlamaForCausalLM(config), batches, sparsity=0.75, progress=False)
        >>> (model.model.layers[0].mlp.up_proj.weight == 0).float().mean()
        tensor(0.7500)
    """
    pattern = pattern_with_group(pattern, group, default="layer")
    if not is_finite_number(exponent) or exponent < 0:
        raise ValueError(f"`exponent` is the power of the activations' norm, at least 0, got {exponent!r}; take 0.5.")
    run = plan_run(
        model,
        batches,
        "ria",
        pattern,
        sparsity,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        settings={"exponent": exponent},
    )

    def prune(name: str, linear: nn.Module, statistics: ColumnNorms) -> None:
        scores = ria_importance(get_weight(linear).detach(), statistics.norms, float(exponent))
        prune_by_scores(name, linear, scores, pattern, run.sparsities[name])

    run.execute(
        empty_norms,
        prune,
        checkpoint_dir=checkpoint_dir,
        device=device,
        measure_error=measure_error,
        progress=progress,
    )
    return model
