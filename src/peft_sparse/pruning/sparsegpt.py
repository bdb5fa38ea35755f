"""SparseGPT: what is pruned is made up for by the weights that stay (arXiv 2301.00774).

    score_ij = (w_ij / U_jj)^2,   H^-1 = U^T U,   H = 2 X^T X / n,   compared within blocks of 128 input columns

X holds a layer's inputs over all calibration tokens. Columns are pruned from left to right, and the error of each one
is passed on to those after it, so unlike Wanda's, weights that stay change. Blocks are pruned in order, and each one
sees the activations of the pruned blocks before it. The update itself is in sparsity/reconstruction.py.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from peft_sparse.linears import get_weight, set_weight
from peft_sparse.pruning.run import plan_run
from peft_sparse.pruning.sharing import HessianOfInputs, SharedHessians
from peft_sparse.pruning.targets import Names
from peft_sparse.sparsity import (
    Hessian,
    InputFactor,
    Pattern,
    Unstructured,
    factorize_,
    fit_block_size,
    is_finite_number,
    pattern_with_group,
    prune_and_reconstruct,
    round_keeping_support,
)

Model = TypeVar("Model", bound=nn.Module)

# Each failed factorisation is tried again with ten times the damping. What fails at 100 times the mean of the diagonal
# is not rounding.
MAX_TRIES = 5
FIRST_RETRY = 0.01


def prune_sparsegpt(
    model: Model,
    batches: Iterable[Mapping[str, torch.Tensor]],
    pattern: str | Pattern = "unstructured",
    sparsity: float | Mapping[str, float] | None = None,
    *,
    group: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    match_authors: bool = False,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    measure_error: bool = False,
    progress: bool = True,
) -> Model:
    """Zero weights by SparseGPT and move those that stay, in place.

    Every layer has exactly `int(sparsity * numel)` zeros afterwards, or those that it had where these are more, and
    with an N:M pattern N weights are kept of every M. An input that is zero in every calibration token is dead: its
    weights go first, since they change nothing.

    Args:
        model: with repeated transformer blocks. By default all their linear layers are pruned except routers and gates
            of experts and, with a warning, those that are not called; never embeddings, pooler or head. Its weights
            may be kept in CPU memory or on disk by accelerate's hooks.
        batches: calibration data, dicts of tensors as the model's forward takes them (`input_ids`, `attention_mask`,
            ...): a list, a DataLoader, a generator, a tokenized `datasets` dataset; see [`calibration_batches`].
            Tokens that `attention_mask` marks as padding do not count. The authors take 128 sequences of 2048 tokens.
        pattern: `"unstructured"` or `"N:M"`, N weights kept of every M consecutive ones along in_features.
        sparsity: share of zeros in [0, 1); None: 0.5. An N:M pattern fixes it at 1 - N/M; another value is an error. A
            mapping from full names, ends of names or regexes, such as [`owl_sparsity`] returns, sets it by layer.
        group: what competes within a block of columns: `"layer"`, all its weights (None, the paper's), or `"row"`,
            those of one output, each row with `int(sparsity * in_features)` zeros. Not for N:M.
        damping: added to the diagonal of the Hessian, relative to its mean. If a factorisation fails, it is tried
            again with ten times as much, and a warning names the layer.
        block_size: columns whose masks are chosen together.
        match_authors: prune exactly what the authors' code does: in unstructured patterns one weight more in every
            block of columns, and all weights of dead inputs.
        target_modules: linear layers to prune instead of all: names or their last parts, or one regex for full names,
            as in PEFT; inside the blocks.
        exclude_modules: linear layers to leave alone, given in the same way.
        checkpoint_dir, device, measure_error: as in [`prune_wanda`].
        progress: show a bar over the blocks.

    Returns:
        `model` itself, in the mode (training or evaluation) in which it came, with what was done in its config as
        after [`prune_wanda`]. Dtypes stay; statistics and updates are computed in float32 and rounded once.

    Raises:
        ValueError: for a malformed pattern, sparsity, group, damping or block size; for an empty calibration set or
            one whose activations hold NaN or infinity, or sequences longer than the model's context; if in_features of
            a target is not divisible by M; if a target gets no input.
        RuntimeError: if a Hessian cannot be factorised with any damping. After any error, a keyboard interrupt
            included, the model is as it was.

    Memory:
        As for `prune_wanda`, plus, for one block at a time: a Hessian of 4 * in_features^2 bytes for each different
        input of its linear layers (q, k and v of a Llama share one, gate and up another), factorised in place; the
        inputs of one batch, once more where a Hessian is shared; and three float32 copies of the weight that is being
        pruned.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> batches = [{"input_ids": torch.randint(0, 8, (2, 6))} for _ in range(4)]
        >>> model = prune_sparsegpt(LlamaForCausalLM(config), batches, "2:4", progress=False)
        >>> (model.model.layers[0].mlp.up_proj.weight == 0).reshape(-1, 4).sum(dim=1).unique()
        tensor([2])
    """
    pattern = pattern_with_group(pattern, group, default="layer")
    _check_options(pattern, damping, block_size, match_authors)
    run = plan_run(
        model,
        batches,
        "sparsegpt",
        pattern,
        sparsity,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        settings={"damping": damping, "block_size": block_size, "match_authors": match_authors},
    )
    prune_linear = LinearPruner(pattern, damping, block_size, match_authors)

    def prune(name: str, linear: nn.Module, statistics: HessianOfInputs) -> None:
        prune_linear(name, linear, statistics, run.sparsities[name])

    run.execute(
        SharedHessians().new_statistics,
        prune,
        checkpoint_dir=checkpoint_dir,
        device=device,
        measure_error=measure_error,
        progress=progress,
    )
    return model


class LinearPruner:
    """Prunes linears one by one, each with the Hessian of its inputs; linears that share one share its factor.

    Args:
        pattern, damping, block_size, match_authors: as in [`prune_sparsegpt`].
    """

    def __init__(
        self, pattern: Pattern, damping: float = 0.01, block_size: int = 128, match_authors: bool = False
    ) -> None:
        self.pattern, self.damping, self.match_authors = pattern, float(damping), match_authors
        self.block_size = fit_block_size(pattern, block_size)
        self._factors: weakref.WeakKeyDictionary[Hessian, InputFactor] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, name: str, linear: nn.Module, statistics: HessianOfInputs, sparsity: float) -> None:
        """Prune one linear in place and let go of its Hessian.

        Raises:
            RuntimeError: if the Hessian cannot be factorised; `name` is what messages call the linear.
            ValueError: if a weight does not fit the linear's dtype. The weight is as it was then.
        """
        hessian = statistics.hessian
        weight = get_weight(linear).detach().to(hessian.matrix.device)
        with torch.autocast(weight.device.type, enabled=False):
            if hessian not in self._factors:
                self._factors[hessian] = _factorize(name, hessian, self.damping, self.block_size)
            factor = self._factors[hessian]
            result = prune_and_reconstruct(weight, factor, self.pattern, sparsity, self.match_authors)
        result = round_keeping_support(result, result != 0, weight.dtype)
        if not bool(result.isfinite().all()):
            raise ValueError(
                f"SparseGPT's weights have to fit the model's dtype, got infinite {weight.dtype} ones in `{name}`; "
                "load the model in float32 or bfloat16, or exclude that layer with `exclude_modules`."
            )
        set_weight(linear, result)
        statistics.release()


def _check_options(pattern: Pattern, damping: float, block_size: int, match_authors: bool) -> None:
    if not is_finite_number(damping) or damping < 0:
        raise ValueError(
            f"`damping` is relative to the mean of the Hessian's diagonal and at least 0, got {damping!r}; the "
            "authors take 0.01."
        )
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"`block_size` counts columns, at least 1, got {block_size!r}; the authors take 128.")
    if match_authors and isinstance(pattern, Unstructured) and pattern.group != "layer":
        raise ValueError(
            f"`match_authors` compares all weights of a block as the authors do, got group={pattern.group!r}; leave "
            "one of the two out."
        )


def _factorize(name: str, hessian: Hessian, damping: float, block_size: int) -> InputFactor:
    diagonal = hessian.matrix.diagonal().clone()
    tried = []
    for _ in range(MAX_TRIES):
        factor = factorize_(hessian.matrix, diagonal, damping, block_size)
        if factor is not None:
            return factor
        tried.append(damping)
        damping = max(10 * damping, FIRST_RETRY)
        if len(tried) < MAX_TRIES:
            warnings.warn(
                f"The Hessian of the inputs of `{name}` is not positive definite with damping {tried[-1]:g}; trying "
                f"{damping:g}. More calibration tokens than its {len(diagonal)} input features make it so.",
                stacklevel=6,
            )
    raise RuntimeError(
        f"SparseGPT factorises the Hessian of a layer's inputs, but that of `{name}` is not positive definite with "
        f"damping {', '.join(f'{value:g}' for value in tried)}; give more or other batches, or exclude the layer with "
        "`exclude_modules`."
    )
