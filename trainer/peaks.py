"""Where curves peak: pure functions on sequences of metrics.

The first best value of a curve is its peak, so of equal values the earliest counts. A value that is
not finite (NaN, infinities) is never a best one.

Example::

    first_best([0.1, 0.4, 0.4, 0.2], "max")                     # 1
    earliest_champion({"b": [1, 2, 1], "a": [1, 2, 1]}, "max")  # Champion(name="a", index=1)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.strategy import Mode


@dataclass(frozen=True, kw_only=True)
class Champion:
    """A sub-dataset's first best evaluation."""

    name: str
    index: int
    """Position in the curve, from 0."""


def overall(
    metrics: Mapping[str, float],
    counts: Mapping[str, int],
    how: Literal["examples", "sub_datasets"],
) -> float:
    """Return the metric of the whole mixture.

    ``counts`` names the sub-datasets and says how many examples of each were evaluated.
    ``"examples"`` weights each sub-dataset by its count (what the MSFT paper's code does),
    ``"sub_datasets"`` weights all alike. The result does not depend on the order of the names; one
    metric that is NaN makes it NaN, since means over different sub-datasets cannot be compared.
    """
    if not counts:
        raise ValueError("no sub-dataset to take the mean over")
    if how == "sub_datasets":
        return math.fsum(metrics[name] for name in counts) / len(counts)
    total = sum(counts.values())
    return math.fsum(metrics[name] * count for name, count in counts.items()) / total


def is_better(candidate: float, best: float | None, mode: Mode) -> bool:
    """Say whether ``candidate`` beats ``best``: equal does not, any finite one beats ``None``."""
    if not math.isfinite(candidate):
        return False
    if best is None or not math.isfinite(best):
        return True
    return candidate > best if mode == "max" else candidate < best


def first_best(values: Iterable[float], mode: Mode) -> int | None:
    """Return the index of the first best value, or ``None`` where no value is finite."""
    best: float | None = None
    index = None
    for i, value in enumerate(values):
        if is_better(value, best, mode):
            best, index = value, i
    return index


def earliest_champion(curves: Mapping[str, Sequence[float]], mode: Mode) -> Champion | None:
    """Return the champion with the smallest index, of equals the one whose name sorts first.

    Curves without a finite value have no champion; ``None`` where no curve has one.
    """
    champions = [
        Champion(name=name, index=index)
        for name, values in curves.items()
        if (index := first_best(values, mode)) is not None
    ]
    return min(champions, key=lambda champion: (champion.index, champion.name), default=None)
