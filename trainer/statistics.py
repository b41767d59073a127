"""Means over seeds with their standard errors: pure functions on numbers.

Example::

    estimate([0.61, 0.63, 0.62])                # mean 0.62, error 0.0058, count 3
    paired({0: 0.63, 1: 0.64}, {0: 0.61, 1: 0.63})      # mean 0.015, error 0.005, count 2
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, and how far it may be off."""

    mean: float
    error: float | None
    """Standard error of the mean, from the sample variance; ``None`` for a single value."""
    count: int
    """Values, at least 1."""


def estimate(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard error, or ``None`` of nothing; one NaN makes both NaN."""
    numbers = list(values)
    if not numbers:
        return None
    count = len(numbers)
    mean = _mean(numbers)
    error = None
    if count > 1:
        variance = math.fsum((x - mean) ** 2 for x in numbers) / (count - 1)
        error = math.sqrt(variance / count)
    return Estimate(mean=mean, error=error, count=count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference ``ours - theirs`` over the seeds that both have.

    Its error is that of the differences: what a seed does to both alike is not in it.
    """
    return estimate(ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs)))


def spread(values: Iterable[float]) -> float:
    """Return the standard deviation over all of a mixture's sub-datasets (divided by n).

    They are the whole mixture and not a sample of one; ``values`` must not be empty.
    """
    numbers = list(values)
    mean = _mean(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers))


def _mean(numbers: list[float]) -> float:
    """Return a mean that lies between the least and the greatest number, rounding or not."""
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return min(max(math.fsum(numbers) / len(numbers), min(numbers)), max(numbers))
