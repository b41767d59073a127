"""Find numbers that are not finite.

Example::

    first_non_finite({"training loss": loss, "gradient norm": norm})      # None if all are finite
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat


@dataclass(frozen=True, kw_only=True)
class NonFiniteNumber:
    """A number that is not finite."""

    what: str
    value: str
    """``nan``, ``inf`` or ``-inf``."""


def first_non_finite(numbers: Mapping[str, SupportsFloat | None]) -> NonFiniteNumber | None:
    """Return the first number that is not finite; ``None`` counts as finite."""
    for what, number in numbers.items():
        value = 0.0 if number is None else float(number)
        if not math.isfinite(value):
            return NonFiniteNumber(what=what, value=str(value))
    return None


def all_non_finite(losses: Mapping[str, float]) -> NonFiniteNumber | None:
    """Return a number that is not finite if the losses of all sub-datasets are so.

    Single losses that are not finite may be due to the examples; if all are, the weights are
    unusable.
    """
    if any(math.isfinite(loss) for loss in losses.values()):
        return None
    return first_non_finite({"validation loss of every sub-dataset": next(iter(losses.values()))})


def non_finite_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics that are not finite, sorted."""
    return sorted(name for name, value in metrics.items() if not math.isfinite(value))
