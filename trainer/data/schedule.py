"""The share of each sub-dataset in an epoch, the optimizer steps of a stage, and its evaluations.

With any sampling, an epoch has as many examples as the mixture, so that methods and budgets in
epochs stay comparable. With a share above 1, examples are seen more than once in an epoch; with one
below 1, some are left for a later epoch.

Example::

    shares({"a": 900, "b": 100}, "equal")                # {"a": 0.556, "b": 5.0}
    # after steps 4, 8, 12, 16
    stage_schedule(examples=1000, batch_size=64, eval_every=0.25, epochs=1.0).evaluations
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainer.config.schema import EvalConfig

Sampling = Literal["proportional", "equal", "temperature"]


def shares(
    sizes: Mapping[str, int], sampling: Sampling, temperature: float | None = None
) -> dict[str, float]:
    """Return the share of each sub-dataset's examples that an epoch has.

    With N examples in total, of which n_k are of sub-dataset k, an epoch has N p_k of them:

    - ``proportional``: p_k = n_k / N, each example once; all shares are exactly 1;
    - ``equal``: p_k is the same for all;
    - ``temperature``: p_k is proportional to n_k ** (1 / ``temperature``). 1 is ``proportional``,
      infinity would be ``equal``; below 1, large sub-datasets get a larger share.

    Raises :class:`ValueError` for a size below 1, or a ``temperature`` that is not above 0.
    """
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"every sub-dataset needs an example, got {dict(sizes)}")
    if sampling == "proportional":
        return dict.fromkeys(sizes, 1.0)
    if sampling == "equal":
        power = 0.0
    elif temperature is None or not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    else:
        power = 1 / temperature
    # Relative to the largest size, so that no power overflows.
    largest = math.log(max(sizes.values(), default=1))
    weights = {name: math.exp(power * (math.log(n) - largest)) for name, n in sizes.items()}
    scale = sum(sizes.values()) / sum(weights.values()) if weights else 0.0
    return {name: scale * weights[name] / n for name, n in sizes.items()}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The optimizer steps of a stage."""

    steps_per_epoch: int
    """Optimizer steps of an epoch; the last one may have a smaller batch."""
    steps: int
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

    def evaluated_every(self, interval: float | None) -> Schedule:
        """Return the schedule with evaluations after the steps nearest to multiples of an interval.

        ``interval`` is in optimizer steps; ``None`` leaves the schedule as it is.
        """
        if interval is None:
            return self
        wanted = {_nearest(k * interval) for k in range(1, math.floor(self.steps / interval) + 1)}
        inside = {step for step in wanted if 1 <= step < self.steps}
        return replace(self, evaluations=(*sorted(inside), self.steps))


def evaluation_interval(evaluation: EvalConfig, *, mixture_steps: int) -> float | None:
    """Return the optimizer steps between two evaluations of any stage.

    ``mixture_steps`` are those of an epoch of the whole mixture. Returns ``None`` if the interval
    depends on the stage.
    """
    if evaluation.cadence == "steps":
        return evaluation.eval_every
    return evaluation.eval_every * mixture_steps if evaluation.cadence == "mixture" else None


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

    Each epoch has an example; the last one may be partial.
    """
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
