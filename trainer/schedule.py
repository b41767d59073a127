"""The steps of a stage, and after which of them it is evaluated.

Example::

    # after steps 4, 8, 12, 16
    stage_schedule(examples=1000, batch_size=64, eval_every=0.25, epochs=1.0).evaluations
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The optimizer steps of a stage."""

    steps_per_epoch: int
    """The last batch of an epoch may be smaller."""
    steps: int
    """Of the whole stage."""
    evaluations: tuple[int, ...]
    """Steps after which all sub-datasets are evaluated, ascending, the last one after the last
    step. The evaluation of the stage's root, index 0, comes before."""


def stage_schedule(*, examples: int, batch_size: int, eval_every: float, epochs: float) -> Schedule:
    """Lay out a stage of ``epochs`` epochs, evaluated every ``eval_every`` epochs.

    Step k is at epoch k / ``steps_per_epoch``. Evaluations fall on the nearest step; where an epoch
    has too few steps for all of them, those that fall on the same step are one.
    """
    if examples < 1:
        raise ValueError("a stage needs at least one example")
    per_epoch = math.ceil(examples / batch_size)
    steps = max(1, _nearest(epochs * per_epoch))
    count = math.floor(epochs / eval_every + 1e-9)
    wanted = {_nearest(k * eval_every * per_epoch) for k in range(1, count + 1)}
    inside = {step for step in wanted if 1 <= step < steps}
    return Schedule(steps_per_epoch=per_epoch, steps=steps, evaluations=(*sorted(inside), steps))


def _nearest(value: float) -> int:
    """Return the nearest integer, halves up, whatever the last bits of a product say."""
    return math.floor(value + 0.5 + 1e-9)
