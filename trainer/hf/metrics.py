"""Read the metric of each sub-dataset from what a Trainer reports of an evaluation.

The Trainer evaluates the sub-datasets one by one and reports each with its name in front of the
metrics: ``eval_NAME_loss``. A metric that a trainer reports under the same name for all of them, as
TRL does with ``eval_entropy``, belongs to the sub-dataset whose report it is in.

Example::

    metrics = MetricReader(key="loss", names=("chat", "maths"))
    metrics.name_of(report), metrics.value(report, "maths")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from trainer.errors import ConfigError
from trainer.text import did_you_mean

_PREFIX = "eval_"
_RUNTIME = "_runtime"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The values of one evaluation by sub-dataset."""

    metrics: Mapping[str, float]
    losses: Mapping[str, float]
    """NaN where the Trainer reports no loss."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MetricReader:
    """Finds the metric of a sub-dataset in a report."""

    key: str
    """The metric's name without ``eval_`` and the sub-dataset's name."""
    names: tuple[str, ...]
    """The sub-datasets."""

    def name_of(self, report: Mapping[str, Any]) -> str | None:
        """Return the sub-dataset that a report is of, or ``None``."""
        found = [n for n in self.names if f"{_PREFIX}{n}{_RUNTIME}" in report]
        return max(found, key=len, default=None)

    def read(self, reports: Mapping[str, Mapping[str, Any]]) -> Measured:
        """Return the values of an evaluation from the report of each sub-dataset."""
        return Measured(
            metrics={name: self._find_metric(reports[name], name) for name in self.names},
            losses={name: _number(reports[name], name, "loss") for name in self.names},
            seconds=math.fsum(_number(reports[name], name, "runtime") for name in self.names),
        )

    def _find_metric(self, report: Mapping[str, Any], name: str) -> float:
        """Return the metric of a sub-dataset; raise :class:`ConfigError` if it is not reported."""
        for key in (f"{_PREFIX}{name}_{self.key}", f"{_PREFIX}{self.key}", self.key):
            value = report.get(key)
            if isinstance(value, Real):
                return float(value)
        start = f"{_PREFIX}{name}_"
        known = [key.removeprefix(start) for key in report if key.startswith(start)]
        raise ConfigError(
            f"the evaluation of {name!r} reports no metric {self.key!r}; it has "
            f"{', '.join(sorted(known))}{did_you_mean(self.key, known)}"
        )


def _number(report: Mapping[str, Any], name: str, key: str) -> float:
    value = report.get(f"{_PREFIX}{name}_{key}")
    return float(value) if isinstance(value, Real) else math.nan
