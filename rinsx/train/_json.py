"""Numbers as JSON, which has none that are not finite."""

import math
from collections.abc import Mapping
from typing import Any


def encode(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Metrics as JSON: scalars of any library become Python numbers, and infinities and NaN become `None`."""
    found = {}
    for name, value in metrics.items():
        number = value if type(value) is int else float(value)
        found[name] = number if math.isfinite(number) else None
    return found
