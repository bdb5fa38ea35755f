"""Pruning single linears on given inputs, ours and the authors': statistics of all batches, then the zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.authors_pruning import AuthorsSparseGpt, AuthorsWanda
from peft_sparse.linears import get_weight, set_weight
from peft_sparse.pruning.sharing import SharedHessians
from peft_sparse.pruning.sparsegpt import LinearPruner
from peft_sparse.pruning.targets import prune_by_scores
from peft_sparse.sparsity import ColumnNorms, parse_pattern, pattern_with_group, wanda_importance

METHODS = ("wanda", "sparsegpt")
PEERS = ("ours", "authors")

Batches = list[torch.Tensor]
# What a step prunes: linears by name, each with the batches that it gets.
Layers = Mapping[str, tuple[nn.Linear, Batches]]


def prune_layers(
    peer: str, method: str, pattern: str, sparsity: float, layers: Layers, match_authors: bool = False
) -> None:
    """Prune linears in place, the batches in the order of a model's forward.

    Args:
        peer: "ours" or "authors".
        match_authors: for our SparseGPT, to prune what theirs does and not the exact count.
    """
    if peer == "authors":
        wrapped = {
            name: (AuthorsWanda if method == "wanda" else AuthorsSparseGpt)(linear)
            for name, (linear, _) in layers.items()
        }
        _feed(layers, {name: layer.add_batch for name, layer in wrapped.items()})
        n, _, m = pattern.partition(":")
        for layer in wrapped.values():
            layer.prune(sparsity, (int(n), int(m)) if m else None)
    elif method == "wanda":
        norms = {name: ColumnNorms(linear.in_features, linear.weight.device) for name, (linear, _) in layers.items()}
        _feed(layers, {name: statistics.update for name, statistics in norms.items()})
        parsed = pattern_with_group(pattern, None, default="row")
        for name, (linear, _) in layers.items():
            # no name for the scores, which would outlive their layer
            prune_by_scores(
                name, linear, wanda_importance(get_weight(linear).detach(), norms[name].norms), parsed, sparsity
            )
    else:
        shared = SharedHessians()
        statistics = {name: shared.new_statistics(linear) for name, (linear, _) in layers.items()}
        _feed(layers, {name: hessian.update for name, hessian in statistics.items()})
        prune = LinearPruner(parse_pattern(pattern), match_authors=match_authors)
        for name, (linear, _) in layers.items():
            prune(name, linear, statistics[name], sparsity)


def _feed(layers: Layers, updates: Mapping[str, Callable[[torch.Tensor], None]]) -> None:
    for index in range(len(next(iter(layers.values()))[1])):
        for name, (_, batches) in layers.items():
            updates[name](batches[index])


def layer_step(
    peer: str, method: str, pattern: str, sparsity: float, match_authors: bool = False
) -> Callable[[nn.Linear, Batches], None]:
    """The same for one linear."""
    return lambda linear, batches: prune_layers(
        peer, method, pattern, sparsity, {"layer": (linear, batches)}, match_authors
    )


class PruningStep:
    """What is timed: statistics and zeros of some linears, from the same dense weights in every run."""

    def __init__(self, peer: str, method: str, pattern: str, sparsity: float, layers: Layers) -> None:
        self.settings, self.layers = (peer, method, pattern, sparsity), layers
        self.dense = {name: linear.weight.detach().clone() for name, (linear, _) in layers.items()}

    @torch.no_grad()
    def __call__(self) -> None:
        for name, (linear, _) in self.layers.items():
            set_weight(linear, self.dense[name])
        prune_layers(*self.settings, self.layers)
