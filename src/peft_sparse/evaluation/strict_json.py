"""Numbers as JSON that every reader takes: it has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(values: Any) -> str:
    """Plain values as JSON; NaN and infinity become null, anything else that JSON has not its `str`.

    Examples:
        >>> print(strict_json({"loss": float("nan")}))
        {
          "loss": null
        }
    """
    return json.dumps(_finite(values), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
