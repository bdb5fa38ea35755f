"""The rows of the tables in which a dense model becomes sparse while it is fine-tuned: encoders and NLG.

All tune the linears of the repeated blocks and, where there is one, the task's head, which starts at random;
embeddings, norms and the biases stay as they are in every row, dense fine-tuning too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft import get_peft_model
from torch import nn

from benchmarks.leaderboard import tuned
from benchmarks.leaderboard.tuned import Tuned
from peft_sparse import PstConfig, prune_magnitude

SCORES_AB, SCORES_RC = ("pst_A", "pst_B"), ("pst_R", "pst_C")


class Setup(NamedTuple):
    """What a row is told: the sparsity at the end, the heads (last names of modules) and PEFT's task type."""

    sparsity: float
    heads: tuple[str, ...]
    task_type: str


class PstMethod(NamedTuple):
    """A row; `start` has one rate, or one for weights and one for scores.

    Attributes:
        adapt: None for a row that is not trained.
        dense: it is not pruned, so it is the same at every sparsity.
        tuned_first: only where rows start from a dense model that was tuned first.
        taught: half of its loss is from that model, which is the row's own with its adapter off.
    """

    title: str
    adapt: Callable[[nn.Module, Setup], Tuned] | None
    start: tuple[float, ...]
    dense: bool = False
    tuned_first: bool = False
    taught: bool = False


def _tuner(frozen: Sequence[str] = (), **options) -> Callable[[nn.Module, Setup], Tuned]:
    def adapt(model: nn.Module, setup: Setup) -> Tuned:
        config = PstConfig(
            sparsity=setup.sparsity,
            task_type=setup.task_type,
            modules_to_save=list(setup.heads) or None,
            **options,
        )
        return tuned.pst_tuned(get_peft_model(model, config), frozen)

    return adapt


def dense(model: nn.Module, setup: Setup) -> Tuned:
    """Dense fine-tuning."""
    return tuned.full(model, masked=False, heads=setup.heads)


def _one_shot_before(model: nn.Module, setup: Setup) -> Tuned:
    """The pretrained model is pruned at once, then what is left is tuned."""
    prune_magnitude(model, "unstructured", setup.sparsity)
    return tuned.full(model, masked=True, heads=setup.heads)


def _one_shot_after(model: nn.Module, setup: Setup) -> Tuned:
    """Dense fine-tuning, and the result is pruned at once. The outputs before and after differ by the pruning."""
    found = tuned.full(model, masked=False, heads=setup.heads)
    return Tuned(model, lambda: prune_magnitude(model, "unstructured", setup.sparsity), found.groups)


METHODS: dict[str, PstMethod] = {
    "dense": PstMethod("dense fine-tuning", dense, (1e-4,), dense=True),
    "one_shot": PstMethod("one-shot magnitude, then tuned", _one_shot_before, (3e-4,)),
    "one_shot_after": PstMethod("one-shot magnitude after dense tuning", _one_shot_after, (1e-4,)),
    "gradual": PstMethod("gradual magnitude", _tuner(importance="magnitude", weight_update="full"), (3e-4,)),
    "movement": PstMethod("movement", _tuner(importance="movement", weight_update="full"), (3e-4,)),
    "pst": PstMethod("PST (ours)", _tuner(), (5e-4, 5e-4)),
    "pst_no_ab": PstMethod("PST without A B", _tuner(SCORES_AB, alpha1=0.0), (5e-4, 5e-4)),
    "pst_no_rc": PstMethod("PST without R C", _tuner(SCORES_RC, alpha2=0.0), (5e-4, 5e-4)),
    "pst_no_uv": PstMethod("PST without U V", _tuner(weight_update="none"), (5e-4, 5e-4)),
}
# Only run when `--rows` names them, or, those of a tuned model, with `--tuned-first`: whether it is PST's mask or its
# update of low rank that a result is due to, whether a U that is small at the start, so that it learns beside V, is
# better at the same number of parameters, and what a teacher adds.
VARIANTS: dict[str, PstMethod] = {
    "tuned": PstMethod("the dense model that all start from", None, (), dense=True, tuned_first=True),
    "pst_taught": PstMethod("PST, with a teacher", _tuner(), (5e-4, 5e-4), tuned_first=True, taught=True),
    "gradual_taught": PstMethod(
        "gradual magnitude, with a teacher",
        _tuner(importance="magnitude", weight_update="full"),
        (3e-4,),
        tuned_first=True,
        taught=True,
    ),
    "pst_full": PstMethod("PST's scores, every weight tuned", _tuner(weight_update="full"), (3e-4, 5e-4)),
    "pst_r32": PstMethod("PST r=32", _tuner(r=32), (5e-4, 5e-4)),
    "pst_unit": PstMethod("PST, U of length 1 at the start", _tuner(init_weights="unit"), (1e-3, 5e-4)),
}
ALL = {**METHODS, **VARIANTS}
OURS = "pst"
RIVALS = ("one_shot", "one_shot_after", "gradual", "movement")
