"""The optimizer steps of a stage and its evaluations.

Example::

    # after steps 4, 8, 12, 16
    stage_schedule(examples=1000, batch_size=64, eval_every=0.25, epochs=1.0).evaluations
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The optimizer steps of a stage."""

    steps_per_epoch: int
    """Optimizer steps of an epoch; the last one may have a smaller batch."""
    steps: int
    """Optimizer steps of the stage."""
    evaluations: tuple[int, ...]
    """Steps after which all sub-datasets are evaluated, ascending; the last one is the last step.
    The evaluation of the stage's root, index 0, is not included."""
    ends: tuple[tuple[float, int], ...] = ()
    """The end of each epoch, in epochs and in steps, if epochs differ in length."""

    def epoch(self, step: int) -> float:
        """Return the epochs that are trained after ``step`` steps."""
        if not self.ends:
            return step / self.steps_per_epoch
        before, start = 0.0, 0
        for after, end in self.ends:
            if step <= end:
                return before + (after - before) * (step - start) / (end - start)
            before, start = after, end
        return before


def stage_schedule(*, examples: int, batch_size: int, eval_every: float, epochs: float) -> Schedule:
    """Return the schedule of a stage of ``epochs`` epochs, evaluated every ``eval_every`` epochs.

    Step k is at epoch k / ``steps_per_epoch``. An evaluation is after the nearest step; evaluations
    after the same step are one.
    """
    if examples < 1:
        raise ValueError("a stage needs at least one example")
    per_epoch = math.ceil(examples / batch_size)
    steps = max(1, _nearest(epochs * per_epoch))
    count = math.floor(epochs / eval_every + 1e-9)
    wanted = {_nearest(k * eval_every * per_epoch) for k in range(1, count + 1)}
    inside = {step for step in wanted if 1 <= step < steps}
    return Schedule(steps_per_epoch=per_epoch, steps=steps, evaluations=(*sorted(inside), steps))


def uneven_schedule(
    sizes: Sequence[int], *, batch_size: int, eval_every: float, epochs: float
) -> Schedule:
    """Return the schedule of a stage whose epochs have the numbers ``sizes`` of examples.

    The last epoch may be partial. Raises ``ValueError`` for an epoch without an example.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"each epoch of a stage needs at least one example, got {list(sizes)}")
    steps = list(itertools.accumulate(-(-size // batch_size) for size in sizes))
    ends = tuple((min(float(i + 1), epochs), step) for i, step in enumerate(steps))
    begun = ((0.0, 0), *ends)

    def step_at(epoch: float) -> int:
        for (before, start), (after, end) in itertools.pairwise(begun):
            if epoch <= after + 1e-9:
                return start + _nearest((epoch - before) / (after - before) * (end - start))
        return steps[-1]

    count = math.floor(epochs / eval_every + 1e-9)
    inside = {step_at(k * eval_every) for k in range(1, count + 1)} - {0, steps[-1]}
    return Schedule(
        steps_per_epoch=steps[0],
        steps=steps[-1],
        evaluations=(*sorted(inside), steps[-1]),
        ends=ends,
    )


def _nearest(value: float) -> int:
    """Return the nearest integer, halves up; rounding errors of a product do not change it."""
    return math.floor(value + 0.5 + 1e-9)
