"""Choose the limits and the ticks of plots: pure functions.

A model that has not seen a task may be many times worse at it than after half an epoch, and one
that no longer trains on it, too. An axis that holds all values would then draw the best ones as one
flat line. So an axis holds the best value and those of training; what lies beyond is marked.

Example::

    limits_of([8.8, 1.2, 0.9], [1.2, 0.9], "min")       # (0.891, 1.209): 8.8 lies beyond it
    epoch_ticks(stages)                                 # [(0, "0"), (16, "1"), (24, "1.5")]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.algorithms.base import Mode

_WORTH = 2
"""Least factor by which the shorter axis draws the best values larger."""
_MARGIN = 0.03
_MOST_TICKS = 8


def limits_of(
    values: Iterable[float | None], trained: Iterable[float | None], mode: Mode
) -> tuple[float, float] | None:
    """Return the limits of an axis whose worst values would hide the best ones, or ``None``.

    ``trained`` are the values after steps that trained on the sub-dataset; they are never left out.
    """
    sign = 1 if mode == "min" else -1
    losses = [sign * value for value in values if value is not None and math.isfinite(value)]
    kept = [sign * value for value in trained if value is not None and math.isfinite(value)]
    if not kept:
        return None
    best, end = min(losses), max(kept)
    if max(losses) - best <= _WORTH * (end - best) or end == best:
        return None
    margin = _MARGIN * (end - best)
    low, high = sorted((sign * (best - margin), sign * (end + margin)))
    return low, high


def is_beyond(value: float, limits: tuple[float, float]) -> bool:
    """Return True if a finite value lies beyond the limits of an axis."""
    return math.isfinite(value) and not limits[0] <= value <= limits[1]


@dataclass(frozen=True, kw_only=True)
class StageSteps:
    """The evaluations of a stage on the axis of steps."""

    steps: Sequence[int]
    """Optimizer steps since the run began."""
    epochs: Sequence[float]
    """Epochs since the stage began, increasing."""


def epoch_ticks(stages: Sequence[StageSteps]) -> list[tuple[int, str]]:
    """Return steps and labels for an axis of epochs, which begin again with each stage.

    The end of a stage has a tick, and so have its whole epochs if there is room. The start of a
    stage, where the one before it ends, has none but for the first. Of many stages only some have
    ticks.
    """
    stages = [stage for stage in stages if stage.steps]
    ends = [(stage.steps[-1], stage.epochs[-1]) for stage in stages]
    start = [(stage.steps[0], 0.0) for stage in stages[:1] if len(stage.steps) > 1]
    inside = [
        (step, epoch)
        for stage in stages
        for step, epoch in list(zip(stage.steps, stage.epochs, strict=True))[1:-1]
        if epoch.is_integer()
    ]
    for every in (1, 2, 5, 10, 20, 50, 100):
        ticks = [*start, *ends, *(tick for tick in inside if tick[1] % every == 0)]
        if len(ticks) <= _MOST_TICKS:
            return [(step, f"{epoch:.3g}") for step, epoch in sorted(ticks)]
    sparse = ends[:: -(-len(ends) // _MOST_TICKS)]
    return [(step, f"{epoch:.3g}") for step, epoch in [*start, *sparse]]
