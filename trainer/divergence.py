"""Numbers that are not finite, where training and evaluation find them.

Example::

    finding = not_finite({"training loss": loss, "gradient norm": norm})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A number that is not finite."""

    what: str
    """Whose number it is."""
    value: str
    """``nan``, ``inf`` or ``-inf``."""


def not_finite(numbers: Mapping[str, SupportsFloat | None]) -> Finding | None:
    """Return the first number that is not finite, by what it is called; ``None`` counts as one."""
    for what, number in numbers.items():
        value = 0.0 if number is None else float(number)
        if not math.isfinite(value):
            return Finding(what=what, value=str(value))
    return None


def ruined(losses: Mapping[str, float]) -> Finding | None:
    """Say whether weights that have these losses on the sub-datasets are of no use at all.

    A loss that is not finite here or there may lie in the examples; if all are so, it is the
    weights.
    """
    if any(math.isfinite(loss) for loss in losses.values()):
        return None
    return not_finite({"validation loss of every sub-dataset": next(iter(losses.values()))})


def names_not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of metrics that can never be a best one, sorted."""
    return sorted(name for name, value in metrics.items() if not math.isfinite(value))
