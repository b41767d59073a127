"""Compute the metric of a whole mixture from those of its sub-datasets: pure functions.

Metrics in different units have no mean. Then the metric of the mixture is the mean relative change
against the base, or the mean of those sub-datasets that have one metric, the ``unit``.

Example::

    metrics = mixture_metrics({"a": "loss", "b": "exact_match"}, {"a": "min", "b": "max"})
    metrics.overall, metrics.compute_overall({"a": 1.8, "b": 0.6}, sizes, {"a": 2.0, "b": 0.5})
    mean_metric({"a": 0.5, "b": 1.0}, {"a": 10, "b": 30}, "examples")                # 0.875
    mean_improvement({"a": 0.6, "b": 1.8}, {"a": 0.5, "b": 2.0}, {"a": "max", "b": "min"})   # 0.15
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.algorithms.base import Mode
from trainer.errors import ConfigError

Overall = Literal["examples", "sub_datasets", "relative"]
"""How the metric of the mixture is computed; ``relative``: the mean improvement over the base."""

RELATIVE = "relative_change"
"""The name of the mixture's metric with ``relative``."""


@dataclass(frozen=True, kw_only=True)
class MixtureMetrics:
    """The metrics of the sub-datasets, and the rule for the metric of the mixture."""

    names: Mapping[str, str]
    """Sub-dataset → name of its metric."""
    modes: Mapping[str, Mode]
    """Sub-dataset → direction of its metric."""
    overall: Overall
    counted: tuple[str, ...]
    """The sub-datasets that the metric of the mixture is computed from."""

    @property
    def name(self) -> str:
        """The name of the mixture's metric."""
        return RELATIVE if self.overall == "relative" else self.names[self.counted[0]]

    @property
    def mode(self) -> Mode:
        """The direction of the mixture's metric."""
        return "max" if self.overall == "relative" else self.modes[self.counted[0]]

    @property
    def other_modes(self) -> dict[str, Mode]:
        """The directions that differ from that of the mixture's metric."""
        return {name: mode for name, mode in self.modes.items() if mode != self.mode}

    def compute_overall(
        self,
        metrics: Mapping[str, float],
        sizes: Mapping[str, int],
        base: Mapping[str, float] | None,
    ) -> float:
        """Return the metric of the mixture.

        Args:
            metrics: Sub-dataset → metric.
            sizes: Sub-dataset → number of evaluated examples.
            base: The metrics of the base on the same examples; ``None``: these are the base's.
        """
        if self.overall == "relative":
            modes = {name: self.modes[name] for name in self.counted if name in metrics}
            return mean_improvement(metrics, metrics if base is None else base, modes)
        counts = {name: sizes[name] for name in self.counted if name in sizes}
        return mean_metric(metrics, counts, self.overall) if counts else math.nan


def mixture_metrics(
    names: Mapping[str, str],
    modes: Mapping[str, Mode],
    *,
    overall: Overall | None = None,
    unit: str | None = None,
) -> MixtureMetrics:
    """Return the metrics of a run.

    Args:
        names: Sub-dataset → name of its metric.
        modes: Sub-dataset → direction of its metric.
        overall: The rule for the mixture; ``None``: ``examples`` if all metrics are the same, else
            ``relative``.
        unit: The metric that a mean is taken of if sub-datasets have different ones.

    Raises:
        ConfigError: A mean would add up different metrics.
    """
    kinds = {(name, modes[sub]) for sub, name in names.items()}
    if overall is None:
        overall = "examples" if len(kinds) == 1 else "relative"
    counted = tuple(sorted(names))
    if overall != "relative" and len(kinds) > 1:
        counted = tuple(sub for sub in counted if names[sub] == unit)
        if not counted:
            raise ConfigError(
                f"overall={overall!r} would add up different metrics: use overall='relative'"
            )
    return MixtureMetrics(names=names, modes=modes, overall=overall, counted=counted)


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
