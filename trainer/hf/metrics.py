"""Read the metric of each sub-dataset from what a Trainer reports of an evaluation.

The Trainer evaluates the sub-datasets one by one and reports each with its name in front of the
metrics: ``eval_NAME_loss``. A metric that a trainer reports under the same name for all of them, as
TRL does with ``eval_entropy``, belongs to the sub-dataset whose report it is in.

Example::

    reader = MetricReader(keys={"chat": "loss", "maths": "accuracy"})
    reader.name_of(report), reader.read({"chat": report, "maths": other})
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from trainer.algorithms.base import Mode
from trainer.algorithms.overall import MixtureMetrics, Overall, mixture_metrics
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

    keys: Mapping[str, str]
    """Sub-dataset → its metric's name, without ``eval_`` and the sub-dataset's name."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sub-datasets."""
        return tuple(self.keys)

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
        wanted = self.keys[name]
        for key in (f"{_PREFIX}{name}_{wanted}", f"{_PREFIX}{wanted}", wanted):
            value = report.get(key)
            if isinstance(value, Real):
                return float(value)
        start = f"{_PREFIX}{name}_"
        known = [key.removeprefix(start) for key in report if key.startswith(start)]
        raise ConfigError(
            f"the evaluation of {name!r} reports no metric {wanted!r}; it has "
            f"{', '.join(sorted(known))}{did_you_mean(wanted, known)}"
        )


def check_metrics(
    names: Iterable[str],
    metric: str | Mapping[str, str],
    mode: Mode | Mapping[str, Mode] | None,
    overall: Overall | None,
) -> MixtureMetrics:
    """Return the metrics of a run; raise :class:`ConfigError` if they do not fit together."""
    names = tuple(names)
    keys = _by_name("metric", names, metric)
    given = {} if mode is None else _by_name("mode", names, mode)
    modes: dict[str, Mode] = {}
    for name, key in keys.items():
        found = given.get(name, "min" if key == "loss" else None)
        if found not in ("max", "min"):
            raise ConfigError(f"the direction of {key!r} is unknown: give mode='max' or 'min'")
        modes[name] = found
    return mixture_metrics(keys, modes, overall=overall)


def _by_name(what: str, names: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return one value for each sub-dataset, from one for all or from a mapping."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if value.keys() != set(names):
        raise ConfigError(
            f"{what} has the sub-datasets {', '.join(sorted(value))}, and the mixture has "
            f"{', '.join(names)}: give one for each, or one for all"
        )
    return {name: value[name] for name in names}


def _number(report: Mapping[str, Any], name: str, key: str) -> float:
    value = report.get(f"{_PREFIX}{name}_{key}")
    return float(value) if isinstance(value, Real) else math.nan
