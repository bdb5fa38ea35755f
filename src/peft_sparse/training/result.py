"""What a run did: the result of `finetune`, and result.json in its folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_sparse.evaluation.strict_json import strict_json

# In a run's folder: what it says at its end, and the adapter that it ends with.
RESULT = "result.json"
ADAPTER = "adapter"


@dataclass
class FinetuneResult:
    """What a run did; `to_dict()` is in result.json, where a number that is none (NaN) is null.

    Attributes:
        steps: optimizer steps in all, those before a resumption too.
        resumed_from: a checkpoint, or None.
        metrics: of the last evaluation and of training, as Trainer names them; `train_loss` is the mean over the steps
            since a resumption, and left out where there was none.
        sparsity: share of zeros in the weights of the adapted model, as the forward uses them, as a report counts it:
            also in linears and experts of the blocks that have no adapter.
        trainable: parameters.
        adapter, merged: folders; None for no merge.
        zeros_lost: of the model that SPP tuned, after merging; None where nothing was merged, and for PST, which
            starts from a dense model.
        seconds: in all.
        epochs: of the training data, those before a resumption too.
    """

    method: str
    steps: int
    resumed_from: str | None
    metrics: dict[str, float]
    sparsity: float
    trainable: int
    adapter: str
    merged: str | None = None
    zeros_lost: int | None = None
    seconds: float = 0.0
    epochs: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        shown = {"method": self.method, "steps": f"{self.steps:,}", "trainable": f"{self.trainable:,} parameters"}
        shown |= {name: f"{value:.4f}" for name, value in sorted(self.metrics.items())}
        shown |= {"sparsity": f"{self.sparsity:.2%}", "adapter": self.adapter}
        if self.merged is not None:
            shown["merged"] = self.merged
        if self.zeros_lost is not None:
            shown["zeros lost"] = f"{self.zeros_lost:,}"
        width = max(map(len, shown))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())

    def write(self, folder: Path) -> None:
        """Into result.json in a run's folder."""
        (folder / RESULT).write_text(strict_json(self.to_dict()) + "\n", encoding="utf-8")


def read_result(folder: Path) -> FinetuneResult:
    """The result in a run's folder.

    Raises:
        ValueError: if what is there is none."""
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        metrics = {name: math.nan if value is None else value for name, value in values["metrics"].items()}
        return FinetuneResult(**values | {"metrics": metrics})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{RESULT} is what a run writes at its end, got one in {str(folder)!r} that cannot be read ({error}); "
            "remove it to go on from the last checkpoint."
        ) from error
