"""Where curves peak: pure functions on sequences of metrics.

The first best value of a curve is its peak, so of equal values the earliest counts. A value that is
not finite (NaN, infinities) is never a best one.

Example::

    first_best([0.1, 0.4, 0.4, 0.2], "max")                     # 1
    PeakRule(margin=2).peak([0.1, 0.4, 0.42], [0.02] * 3, "max")  # 1

Whether a margin in standard errors can tell peaks apart with the validation data that there is.

Pure functions, for ``msft.peaks: robust``. A margin that is a large part of the metric itself hides
what training does, and the sub-dataset seems to peak where it began.

Example::

    indistinct({"arith": 0.30}, {"arith": 0.09}, margin=1.0)    # {"arith": 0.09}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.algorithms.base import Mode
from trainer.config.schema import Config

LARGEST_SHARE = 0.1
"""The part of a metric above which a margin hides too much."""


def indistinct(
    metrics: Mapping[str, float], errors: Mapping[str, float], *, margin: float
) -> dict[str, float]:
    """Return the margins, in the metric's unit, that are more than a tenth of their metrics.

    ``errors`` are standard errors by sub-dataset, ``margin`` says how many of them make a
    difference.
    """
    return {
        name: margin * error
        for name, error in errors.items()
        if margin * error > LARGEST_SHARE * abs(metrics[name])
    }


def margin_warnings(
    config: Config,
    metrics: Mapping[str, float],
    errors: Mapping[str, float],
    examples: Mapping[str, int],
) -> list[str]:
    """Return a warning for each sub-dataset whose peak the run's margin can hardly tell.

    ``metrics`` and ``errors`` are of one evaluation, ``examples`` says how many were evaluated.
    """
    margin = config.msft.margin
    if config.method != "msft" or config.msft.peaks != "robust" or margin == 0:
        return []
    return [
        f"warning: the {examples[name]} validation examples of {name} tell metrics apart that "
        f"differ by {width:.3g} (msft.margin: {margin:g} standard errors of {width / margin:.3g}); "
        f"its metric is {metrics[name]:.3g}: give it more validation examples, or lower the margin"
        for name, width in indistinct(metrics, errors, margin=margin).items()
    ]


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


@dataclass(frozen=True, kw_only=True)
class PeakRule:
    """What counts as a peak; the defaults are the paper's rule, the first best value.

    With ``smoothing`` w a value is the mean of itself and the w - 1 before it, as far as there are
    so many. With a ``margin`` m it beats the best so far only by more than m standard errors. A
    peak has passed ``patience`` evaluations later.
    """

    smoothing: int = 1
    margin: float = 0.0
    patience: int = 1

    def peak(self, values: Sequence[float], errors: Sequence[float], mode: Mode) -> int | None:
        """Return the index of the best value, or ``None`` where no value is finite.

        ``errors`` are the standard errors of the values; one that is not finite counts as 0.
        """
        best: float | None = None
        index = None
        for i, (value, error) in enumerate(zip(self._smoothed(values), errors, strict=True)):
            slack = self.margin * error if math.isfinite(error) else 0.0
            worth = value - slack if mode == "max" else value + slack
            if is_better(value if best is None else worth, best, mode):
                best, index = value, i
        return index

    def has_passed(self, index: int, last: int) -> bool:
        """Say whether the peak at ``index`` has passed at evaluation ``last``."""
        return last - index >= self.patience

    def _smoothed(self, values: Sequence[float]) -> Iterable[float]:
        """Yield the means; one that is not finite stands for itself and spoils no other."""
        for i, value in enumerate(values):
            if self.smoothing == 1 or not math.isfinite(value):
                yield value
                continue
            near = [v for v in values[max(0, i - self.smoothing + 1) : i + 1] if math.isfinite(v)]
            yield math.fsum(near) / len(near)


def champions(
    curves: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    mode: Mode,
    rule: PeakRule,
) -> list[Champion]:
    """Return the champions of the curves, the earliest first, of equals by name.

    Curves without a finite value have none.
    """
    found = [
        Champion(name=name, index=index)
        for name, values in curves.items()
        if (index := rule.peak(values, errors[name], mode)) is not None
    ]
    return sorted(found, key=lambda champion: (champion.index, champion.name))
