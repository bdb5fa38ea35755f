"""Wanda: weights go whose magnitude times the norm of their input is smallest (arXiv 2306.11695, equation 1).

    S_ij = |W_ij| * ||X_j||_2,   compared within each output row i

X_j is the j-th input column over all calibration tokens. Blocks are pruned in order, and each one sees the activations
of the pruned blocks before it. No weight that stays is changed.
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
from peft_sparse.sparsity import ColumnNorms, Pattern, pattern_with_group, wanda_importance

Model = TypeVar("Model", bound=nn.Module)


def prune_wanda(
    model: Model,
    batches: Iterable[Mapping[str, torch.Tensor]],
    pattern: str | Pattern = "unstructured",
    sparsity: float | Mapping[str, float] | None = None,
    *,
    group: str | None = None,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    measure_error: bool = False,
    progress: bool = True,
) -> Model:
    """Zero the weights of smallest |W_ij| * ||X_j||_2, in place.

    The weights of one output row compete with each other, or the M weights of each group for an N:M pattern. Every row
    has exactly `int(sparsity * in_features)` zeros afterwards, or those that it had where these are more; of equal
    scores those with the lower index go first.

    Args:
        model: with repeated transformer blocks. By default all their linear layers are pruned except routers and gates
            of experts and, with a warning, those that are not called; never embeddings, pooler or head. Its weights
            may be kept in CPU memory or on disk by accelerate's hooks.
        batches: calibration data, dicts of tensors as the model's forward takes them (`input_ids`, `attention_mask`,
            ...): a list, a DataLoader, a generator, a tokenized `datasets` dataset; see [`calibration_batches`].
            Tokens that `attention_mask` marks as padding do not count. The authors take 128 sequences of the model's
            full length.
        pattern: `"unstructured"` or `"N:M"`, N weights kept of every M consecutive ones along in_features.
        sparsity: share of zeros in [0, 1); None: 0.5. An N:M pattern fixes it at 1 - N/M; another value is an error. A
            mapping from full names, ends of names or regexes, such as [`owl_sparsity`] returns, sets it by layer.
        group: what competes: `"row"`, the weights of one output (None, the paper's), or `"layer"`, all of a layer,
            which then has `int(sparsity * numel)` zeros. Not for N:M.
        target_modules: linear layers to prune instead of all: names or their last parts, or one regex for full names,
            as in PEFT; inside the blocks.
        exclude_modules: linear layers to leave alone, given in the same way.
        checkpoint_dir: a folder to write each block to when it is done, new or empty. A later run with the same
            arguments resumes from there and gives the same model; a run with others is refused.
        device: where to run the blocks, also of a model that does not fit there: they are moved one at a time, and
            nothing else is on it but one batch's activations. None: where they are.
        measure_error: also estimate how much the output of every linear layer changes on the calibration data,
            ||X W_new^T - X W^T|| / ||X W^T||, see `OutputSketch`. It is written into the config and shown by
            [`sparsity_report`].
        progress: show a bar over the blocks.

    Returns:
        `model` itself, in the mode (training or evaluation) in which it came. The config of a model of transformers
        says in `peft_sparse["pruning"]` how it was pruned and on which data, and takes that along when it is saved.

    Raises:
        ValueError: for a malformed pattern, sparsity or group; for an empty calibration set or one whose activations
            hold NaN or infinity, or sequences longer than the model's context; if in_features of a target is not
            divisible by M; if a target gets no input; if a score overflows. After any error, a keyboard interrupt
            included, the model is as it was.

    Memory:
        Besides the model, a copy of the weights that are pruned (in CPU memory, for the promise above; not of those
        that accelerate keeps on disk) and what one block returns for every batch (where the model's inputs are):
        sequences * tokens * hidden_size numbers; at the start, what every block returns for the first batch. With
        `device`, or with offloaded weights, an accelerator holds at its peak one block and one batch's activations.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> batches = [{"input_ids": torch.randint(0, 8, (2, 6))} for _ in range(4)]
        >>> model = prune_wanda(LlamaForCausalLM(config), batches, sparsity=0.75, progress=False)
        >>> (model.model.layers[0].mlp.up_proj.weight == 0).sum(dim=1).unique()
        tensor([6])
    """
    pattern = pattern_with_group(pattern, group, default="row")
    run = plan_run(
        model,
        batches,
        "wanda",
        pattern,
        sparsity,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
    )

    def prune(name: str, linear: nn.Module, statistics: ColumnNorms) -> None:
        scores = wanda_importance(get_weight(linear).detach(), statistics.norms)
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
