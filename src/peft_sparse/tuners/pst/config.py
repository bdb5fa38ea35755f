"""Settings of PST and of the pruning baselines that are rows of the same tuner."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftType

from peft_sparse.sparsity import (
    NM,
    SCHEDULES,
    Unstructured,
    check_sparsity,
    check_sparsity_mapping,
    matching_key,
    parse_pattern,
)
from peft_sparse.tuners.field_checks import (
    check_bool,
    check_choice,
    check_fraction,
    check_number,
    check_positive_int,
)
from peft_sparse.tuners.sparse_config import SparseConfig

DEFAULT_SPARSITY = 0.9
IMPORTANCES = ("pst", "magnitude", "movement")
WEIGHT_UPDATES = ("low_rank", "full", "none")
UNIT = "unit"


@dataclass
class PstConfig(SparseConfig):
    """Configuration of PST (Parameter-efficient Sparse Training, arXiv 2205.11005).

    PST prunes a dense model while it tunes it: Y = X (M * W')^T with W' = W + beta U V, and the mask M keeps the
    weights with the largest scores S = |W'| + alpha1 A B + alpha2 (R + C). A schedule raises the share of pruned
    weights; drive it with `SparsityCallback` or `PstModel.set_sparsity_step`.

    Args:
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, trainable_token_indices:
            as in PEFT's LoraConfig. `target_modules=None` means every linear layer inside the model's repeated
            blocks except, with a warning, routers and gates of experts, linear layers that are not called, and those
            that share a weight.
        r: rank of the weight update U V.
        score_r: rank of the scores A B.
        beta: scale of U V.
        alpha1: scale of A B.
        alpha2: scale of R and C.
        sparsity: share of zeros at the end, in [0, 1). None: 0.9 for unstructured; an N:M pattern fixes it at 1 - N/M,
            and another value is an error.
        sparsity_pattern: shares of zeros at the end for some layers; the others get `sparsity`. Keys are full names,
            ends of names or regexes for them, as in LoraConfig's `rank_pattern`; what `owl_sparsity(...,
            group="layer")` returns fits. Each layer's schedule ends at its own share. Not for N:M, and a key that
            names none of the adapted layers is an error when the adapter is added.
        initial_sparsity: share of zeros at the start of the schedule, of all layers.
        pattern: "unstructured" (the weights of a layer compete), or "N:M" (N kept of every M consecutive weights along
            in_features).
        importance: "pst"; "magnitude" (S = |W'|, data-free); "movement" (S is a trained matrix `pst_S`, arXiv
            2005.07683; it starts at zero and only its order counts, so that Adam's rate for it makes no difference).
        weight_update: "low_rank" (W' = W + beta U V); "full" (W' = W + D with a dense D); "none" (W' = W).
        schedule: "cubic", "linear" or "constant" (the final sparsity from the first step on).
        initial_warmup, final_warmup: fractions of all steps spent at the initial and at the final sparsity.
        total_steps: optimizer steps that the schedule spans. None: what `SparsityCallback` reads from the Trainer, or
            what `set_sparsity_step` is given.
        init_weights: True starts at W' = W and S = |W'| (U and A are normal, V, B, R and C zero, as the authors' are).
            "unit": the same with U divided by sqrt(out_features), so that its columns have about length 1 and U can
            turn beside V; give the weights a learning rate several times as high. Better on a small GPT-2 in
            `benchmarks/results/leaderboard`, not on MiniLM. False draws all of them, which only tests want.
        labels: what a classifier's labels are called, in the order of their numbers. None: with a `task_type` of
            classification, what the model's config calls them when the adapter is added.
        checksums: what saving wrote into adapter_config.json; leave it alone.

    Raises:
        ValueError: for a field outside its range, or fields that contradict each other.

    Examples:
        >>> PstConfig(pattern="2:4").sparsity
        0.5
    """

    function_fields = ("r", "score_r", "beta", "alpha1", "alpha2", "importance", "weight_update", "pattern")

    r: int = field(default=8, metadata={"help": "Rank of the weight update U V."})
    score_r: int = field(default=8, metadata={"help": "Rank of the importance scores A B."})
    beta: float = field(default=1.0, metadata={"help": "Scale of the weight update U V."})
    alpha1: float = field(default=1.0, metadata={"help": "Scale of the low-rank scores A B."})
    alpha2: float = field(default=1.0, metadata={"help": "Scale of the row and column scores R + C."})
    sparsity: float | None = field(
        default=None, metadata={"help": "Final share of zeros. None: 0.9 for unstructured, 1 - N/M for N:M."}
    )
    sparsity_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Final share of zeros for layers that differ from `sparsity`: full names, ends of names or "
            "regexes to shares, such as {'mlp.*': 0.95, 'q_proj': 0.8}. Not for N:M."
        },
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
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: start at the base weights. 'unit': there too, U's columns having length 1. False: start at "
            "random (for tests)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PST
        check_positive_int("r", self.r)
        check_positive_int("score_r", self.score_r)
        for name in ("beta", "alpha1", "alpha2"):
            check_number(name, getattr(self, name))
            setattr(self, name, float(getattr(self, name)))  # tensors take no integer of more than 64 bits
        if self.init_weights != UNIT:
            check_bool("init_weights", self.init_weights, f", or {UNIT!r} to start with a smaller U")
        check_choice("importance", self.importance, IMPORTANCES)
        check_choice("weight_update", self.weight_update, WEIGHT_UPDATES)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.importance == "magnitude" and self.weight_update == "none":
            raise ValueError(
                'importance="magnitude" with weight_update="none" has nothing to train; prune once with '
                "`peft_sparse.prune_magnitude`, or choose another `weight_update`."
            )
        if self.init_weights == UNIT and self.weight_update != "low_rank":
            raise ValueError(
                f'init_weights="unit" is about U of weight_update="low_rank", got weight_update={self.weight_update!r}'
                "; leave `init_weights` out."
            )
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, Unstructured) and pattern.group != "layer":
            raise ValueError(
                f"In PST all weights of a layer compete, got the pattern {pattern!r}; take 'unstructured'."
            )
        self.pattern = str(pattern)  # a pattern object could not be saved
        self.sparsity = pattern.resolve_sparsity(self.sparsity, DEFAULT_SPARSITY)
        check_sparsity("initial_sparsity", self.initial_sparsity)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"A schedule raises the sparsity, got initial_sparsity={self.initial_sparsity} above "
                f"sparsity={self.sparsity}."
            )
        self._check_sparsity_pattern()
        self._check_warmups()
        if self.total_steps is not None:
            check_positive_int("total_steps", self.total_steps)
        self._check_checksums()

    def _check_sparsity_pattern(self) -> None:
        if self.sparsity_pattern is None:
            self.sparsity_pattern = {}
        if not isinstance(self.sparsity_pattern, dict):
            raise ValueError(
                "`sparsity_pattern` is a dict from names or regexes to shares of zeros, got "
                f"{self.sparsity_pattern!r}; one share for all layers is `sparsity`."
            )
        if self.sparsity_pattern and isinstance(parse_pattern(self.pattern), NM):
            raise ValueError(
                f"The pattern {self.pattern} fixes the sparsity of every layer at {self.sparsity:g}, got a "
                f"`sparsity_pattern` of {len(self.sparsity_pattern)} keys; leave it out, or take "
                "pattern='unstructured'."
            )
        check_sparsity_mapping("sparsity_pattern", self.sparsity_pattern)
        for key, sparsity in self.sparsity_pattern.items():
            if self.initial_sparsity > sparsity:
                raise ValueError(
                    f"A schedule raises the sparsity, got initial_sparsity={self.initial_sparsity} above "
                    f"sparsity_pattern[{key!r}]={sparsity}."
                )

    def sparsity_of(self, name: str) -> float:
        """The final share of zeros of the layer with this full name."""
        key = matching_key(self.sparsity_pattern, name)
        return self.sparsity if key is None else self.sparsity_pattern[key]  # type: ignore[return-value] # set above

    def _check_warmups(self) -> None:
        for name in ("initial_warmup", "final_warmup"):
            check_fraction(name, getattr(self, name), of="the steps")
        if self.initial_warmup + self.final_warmup > 1:
            raise ValueError(
                "`initial_warmup` and `final_warmup` are fractions of the steps and sum to at most 1, got "
                f"{self.initial_warmup} + {self.final_warmup}."
            )
