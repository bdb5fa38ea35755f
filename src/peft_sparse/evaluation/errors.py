"""What pruning did to the output of each linear, as the pruner wrote it into the model's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn


def pruning_errors(model_or_path: nn.Module | str | Path) -> dict[str, float]:
    """||X W_new^T - X W^T|| / ||X W^T|| on the calibration data, by full name of the linear.

    Args:
        model_or_path: a model without a PEFT wrapper, or its folder.

    Returns:
        Empty where nothing was measured (`measure_error` of the pruners), or there is no config.
    """
    if isinstance(model_or_path, nn.Module):
        facts: Any = getattr(getattr(model_or_path, "config", None), "peft_sparse", None)
    else:
        file = Path(model_or_path) / "config.json"
        facts = json.loads(file.read_text()).get("peft_sparse") if file.is_file() else None
    return dict(((facts or {}).get("pruning") or {}).get("errors") or {})
