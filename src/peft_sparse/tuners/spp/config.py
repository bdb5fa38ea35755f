"""Settings of SPP."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftType

from peft_sparse.tuners.field_checks import check_bool, check_number, check_positive_int
from peft_sparse.tuners.sparse_config import SparseConfig

ONES = "ones"


@dataclass
class SppConfig(SparseConfig):
    """Configuration of SPP (Sparsity-Preserved Parameter-efficient fine-tuning, arXiv 2405.16057).

    SPP tunes a model that is already pruned: the weight becomes W[i, j] (1 + s B[i] A[g(i), j]), so that its zeros
    survive training and merging.

    Args:
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, trainable_token_indices:
            as in PEFT's LoraConfig. `target_modules=None` means every linear layer inside the model's repeated
            blocks except, with a warning, routers and gates of experts, linear layers that are not called, and those
            that share a weight.
        r: number of row groups that share a row of A. More than a layer has rows: one group per row.
        spp_alpha: scaling s = spp_alpha / r.
        spp_dropout: dropout probability on the input of the update alone; the base weight sees the whole input.
        init_weights: True starts at the identity with A drawn and B = 0, as the authors do. "ones": A = 0 and B = 1,
            the identity too, but A's first steps follow the whole gradient of a row group, not its projection on a
            random A; better at 75% sparsity in `benchmarks/results/leaderboard`, more so with `spp_alpha` = 8 r.
            False draws both, which only tests want.
        labels: what a classifier's labels are called, in the order of their numbers. None: with a `task_type` of
            classification, what the model's config calls them when the adapter is added.
        checksums: what saving wrote into adapter_config.json; leave it alone.

    Raises:
        ValueError: for a field outside its range.

    Examples:
        >>> SppConfig(target_modules=["q_proj", "v_proj"]).r
        16
    """

    function_fields = ("r", "spp_alpha")

    r: int = field(default=16, metadata={"help": "Number of row groups that share a row of the factor A."})
    spp_alpha: float = field(default=32, metadata={"help": "The update is scaled by spp_alpha / r."})
    spp_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "True: start with B = 0. 'ones': with A = 0 and B = 1. False: at random (for tests)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SPP
        check_positive_int("r", self.r)
        check_number("spp_alpha", self.spp_alpha, "; the authors' scaling is 2 * r")
        if not self.spp_alpha > 0:
            raise ValueError(f"`spp_alpha` should be above 0, got {self.spp_alpha!r}; the authors' scaling is 2 * r.")
        check_number("spp_dropout", self.spp_dropout, "; 0.0 drops nothing")
        if not 0 <= self.spp_dropout < 1:
            raise ValueError(f"`spp_dropout` is a probability in [0, 1), got {self.spp_dropout!r}.")
        if self.init_weights != ONES:
            check_bool("init_weights", self.init_weights, f", or {ONES!r} to start with A = 0 and B = 1")
        self._check_checksums()
