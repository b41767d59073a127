"""Find the peaks of metric curves, and warn of margins that hide them: pure functions.

The peak of a curve is its first best value, so the earliest of equal values counts. A value that is
not finite (NaN, infinities) is never the best. A margin (``msft.peaks: robust``) that is large
relative to the metric hides the progress of training, so that a sub-dataset seems to peak at its
start.

Example::

    first_best_index([0.1, 0.4, 0.4, 0.2], "max")                   # 1
    PeakRule(margin=2).peak([0.1, 0.4, 0.42], [0.02] * 3, "max")    # 1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.algorithms.base import Mode
from trainer.config.schema import Config, MsftConfig

_WIDEST = 0.1
"""Largest ratio of margin to metric that gives no warning."""


def margin_warnings(
    config: Config,
    metrics: Mapping[str, float],
    errors: Mapping[str, float],
    examples: Mapping[str, int],
) -> list[str]:
    """Return a warning for each sub-dataset whose margin is too wide for its metric.

    ``metrics`` and their standard ``errors`` are those of one evaluation, on so many ``examples``.
    """
    margin = config.msft.margin
    if config.method != "online" and (config.method != "msft" or config.msft.peaks != "robust"):
        return []
    return [
        f"warning: with {examples[name]} validation examples of {name}, metrics must differ by "
        f"{margin * error:.3g} to count (msft.margin: {margin:g} standard errors of {error:.3g}); "
        f"its metric is {metrics[name]:.3g}: give it more validation examples, or lower the margin"
        for name, error in errors.items()
        if margin * error > _WIDEST * abs(metrics[name])
    ]


def is_better(candidate: float, best: float | None, mode: Mode) -> bool:
    """Return True if ``candidate`` beats ``best``; any finite value beats ``None``."""
    if not math.isfinite(candidate):
        return False
    if best is None or not math.isfinite(best):
        return True
    return candidate > best if mode == "max" else candidate < best


def first_best_index(values: Iterable[float], mode: Mode) -> int | None:
    """Return the index of the first best value, or ``None`` if no value is finite."""
    best: float | None = None
    index = None
    for i, value in enumerate(values):
        if is_better(value, best, mode):
            best, index = value, i
    return index


@dataclass(frozen=True, kw_only=True)
class PeakRule:
    """The rule that finds peaks; the defaults are the paper's rule, the first best value.

    Attributes:
        smoothing: Evaluations whose mean replaces a value: itself and those before it.
        margin: Standard errors by which a value must beat the best so far.
        patience: Evaluations after which a peak has passed.
    """

    smoothing: int = 1
    margin: float = 0.0
    patience: int = 1

    def peak(self, values: Sequence[float], errors: Sequence[float], mode: Mode) -> int | None:
        """Return the index of the best value, or ``None`` if no value is finite.

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
        """Return True if the peak at ``index`` has passed at evaluation ``last``."""
        return last - index >= self.patience

    def _smoothed(self, values: Sequence[float]) -> Iterable[float]:
        """Yield the means; a value that is not finite stays as it is and enters no mean."""
        for i, value in enumerate(values):
            if self.smoothing == 1 or not math.isfinite(value):
                yield value
                continue
            near = [v for v in values[max(0, i - self.smoothing + 1) : i + 1] if math.isfinite(v)]
            yield math.fsum(near) / len(near)


def peak_rule(config: MsftConfig) -> PeakRule:
    """Return the rule that finds peaks."""
    return PeakRule() if config.peaks == "first_best" else robust_rule(config)


def robust_rule(config: MsftConfig) -> PeakRule:
    """Return the robust rule with its settings."""
    return PeakRule(smoothing=config.smoothing, margin=config.margin, patience=config.patience)


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The metric of a sub-dataset at the peak for which it was excluded."""

    value: float
    error: float
    """Standard error of the value; NaN if unknown."""
    mode: Mode

    def is_forgotten(self, value: float, margin: float) -> bool:
        """Return True if ``value`` is worse by more than ``margin`` standard errors."""
        slack = margin * self.error if math.isfinite(self.error) else 0.0
        bound = self.value - slack if self.mode == "max" else self.value + slack
        return math.isfinite(value) and is_better(bound, value, self.mode)


def champions(
    curves: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    modes: Mapping[str, Mode],
    rule: PeakRule,
) -> list[tuple[int, str]]:
    """Return the indices of the curves' best values with their names, sorted.

    ``modes`` are the directions of the curves. A curve without a finite value has no champion.
    """
    found = {name: rule.peak(curves[name], errors[name], modes[name]) for name in curves}
    return sorted((index, name) for name, index in found.items() if index is not None)
