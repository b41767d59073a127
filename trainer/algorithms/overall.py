"""Compute the metric of a whole mixture from those of its sub-datasets: pure functions.

Example::

    mean_metric({"a": 0.5, "b": 1.0}, {"a": 10, "b": 30}, "examples")                # 0.875
    mean_improvement({"a": 0.6, "b": 1.8}, {"a": 0.5, "b": 2.0}, {"a": "max", "b": "min"})   # 0.15
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from trainer.algorithms.base import Mode


def mean_metric(
    metrics: Mapping[str, float],
    counts: Mapping[str, int],
    how: Literal["examples", "sub_datasets"],
) -> float:
    """Return the metric of the whole mixture.

    ``counts`` maps sub-datasets to their numbers of evaluated examples. ``"examples"`` weights each
    sub-dataset by its count, as the MSFT paper's code does; ``"sub_datasets"`` weights all equally.
    The result does not depend on the order of the names. One NaN makes it NaN, because means over
    different sub-datasets cannot be compared.
    """
    if not counts:
        raise ValueError("no sub-dataset to take the mean over")
    if how == "sub_datasets":
        return math.fsum(metrics[name] for name in counts) / len(counts)
    total = sum(counts.values())
    return math.fsum(metrics[name] * count for name, count in counts.items()) / total


def mean_improvement(
    metrics: Mapping[str, float], base: Mapping[str, float], modes: Mapping[str, Mode]
) -> float:
    """Return the mean relative improvement over the base, for metrics in different units.

    The improvement of a metric is its change, in its own direction, divided by the base's value;
    where that is 0, it is the change itself. Higher is better. One NaN makes it NaN.

    Args:
        metrics: Sub-dataset → metric.
        base: Sub-dataset → metric of the base.
        modes: Sub-dataset → direction of its metric.
    """
    if not modes:
        raise ValueError("no sub-dataset to take the mean over")
    found = []
    for name, mode in modes.items():
        change = metrics[name] - base[name]
        found.append((change if mode == "max" else -change) / (abs(base[name]) or 1.0))
    return math.fsum(found) / len(found)
