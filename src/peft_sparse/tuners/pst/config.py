"""Settings of PST and of the pruning baselines that are rows of the same tuner."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftType

from peft_sparse.sparsity import SCHEDULES, check_sparsity, parse_pattern
from peft_sparse.tuners.sparse_config import SparseConfig, check_choice, check_positive_int

DEFAULT_SPARSITY = 0.9
IMPORTANCES = ("pst", "magnitude", "movement")
WEIGHT_UPDATES = ("low_rank", "full", "none")


@dataclass
class PstConfig(SparseConfig):
    """Configuration of PST (Parameter-efficient Sparse Training, arXiv 2205.11005).

    PST prunes a dense model while it tunes it: Y = X (M * W')^T with W' = W + beta U V, and the mask M keeps the
    weights with the largest scores S = |W'| + alpha1 A B + alpha2 (R + C). A schedule raises the share of pruned
    weights; drive it with `SparsityCallback` or `PstModel.set_sparsity_step`.

    Args:
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's LoraConfig.
            `target_modules=None` means every linear inside the model's repeated blocks.
        r: rank of the weight update U V.
        score_r: rank of the scores A B.
        beta: scale of U V. alpha1: scale of A B. alpha2: scale of R and C.
        sparsity: share of zeros at the end, in [0, 1). None: 0.9 for unstructured; an N:M pattern fixes it at 1 - N/M,
            and another value is an error.
        initial_sparsity: share of zeros at the start of the schedule.
        pattern: "unstructured" (the weights of a layer compete), or "N:M" (N kept of every M consecutive weights along
            in_features).
        importance: "pst"; "magnitude" (S = |W'|, data-free); "movement" (S is a trained matrix `pst_S`, arXiv
            2005.07683; give it a learning rate of its own, see `pst_param_groups`).
        weight_update: "low_rank" (W' = W + beta U V); "full" (W' = W + D with a dense D); "none" (W' = W).
        schedule: "cubic", "linear" or "constant" (the final sparsity from the first step on).
        initial_warmup, final_warmup: fractions of all steps spent at the initial and at the final sparsity.
        total_steps: optimizer steps that the schedule spans. None: what `SparsityCallback` reads from the Trainer, or
            what `set_sparsity_step` is given.
        init_weights: True starts at W' = W and S = |W'| (U and A are normal, V, B, R and C zero, as the authors' are);
            False draws all of them, which only tests want.

    Raises:
        ValueError: for a field outside its range, or fields that contradict each other.

    Example:
        >>> PstConfig(pattern="2:4").sparsity
        0.5
    """

    r: int = field(default=8, metadata={"help": "Rank of the weight update U V."})
    score_r: int = field(default=8, metadata={"help": "Rank of the importance scores A B."})
    beta: float = field(default=1.0, metadata={"help": "Scale of the weight update U V."})
    alpha1: float = field(default=1.0, metadata={"help": "Scale of the low-rank scores A B."})
    alpha2: float = field(default=1.0, metadata={"help": "Scale of the row and column scores R + C."})
    sparsity: float | None = field(
        default=None, metadata={"help": "Final share of zeros. None: 0.9 for unstructured, 1 - N/M for N:M."}
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Share of zeros at the start of the schedule."})
    pattern: str = field(default="unstructured", metadata={"help": "'unstructured', or 'N:M' such as '2:4'."})
    importance: str = field(default="pst", metadata={"help": "'pst', 'magnitude' or 'movement'."})
    weight_update: str = field(default="low_rank", metadata={"help": "'low_rank', 'full' or 'none'."})
    schedule: str = field(default="cubic", metadata={"help": "'cubic', 'linear' or 'constant'."})
    initial_warmup: float = field(default=0.1, metadata={"help": "Fraction of the steps at the initial sparsity."})
    final_warmup: float = field(default=0.3, metadata={"help": "Fraction of the steps at the final sparsity."})
    total_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the schedule. None: the Trainer's."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: start at the base weights. False: start at random (for tests)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PST
        check_positive_int("r", self.r)
        check_positive_int("score_r", self.score_r)
        check_choice("importance", self.importance, IMPORTANCES)
        check_choice("weight_update", self.weight_update, WEIGHT_UPDATES)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.importance == "magnitude" and self.weight_update == "none":
            raise ValueError(
                'importance="magnitude" with weight_update="none" has nothing to train; prune once with '
                "`peft_sparse.prune_magnitude`, or choose another `weight_update`."
            )
        self.sparsity = parse_pattern(self.pattern).resolve_sparsity(self.sparsity, DEFAULT_SPARSITY)
        check_sparsity("initial_sparsity", self.initial_sparsity)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"A schedule raises the sparsity, got initial_sparsity={self.initial_sparsity} above "
                f"sparsity={self.sparsity}."
            )
        self._check_warmups()
        if self.total_steps is not None:
            check_positive_int("total_steps", self.total_steps)

    def _check_warmups(self) -> None:
        for name in ("initial_warmup", "final_warmup"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is a fraction of the steps in [0, 1], got {value!r}.")
        if self.initial_warmup + self.final_warmup > 1:
            raise ValueError(
                "`initial_warmup` and `final_warmup` are fractions of the steps and sum to at most 1, got "
                f"{self.initial_warmup} + {self.final_warmup}."
            )
