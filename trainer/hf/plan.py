"""Plan the steps and evaluations of a stage from what a Trainer says of its batches.

Sub-datasets with a limit are left out from an epoch on, as single roll-out search requires. A
Trainer has one data set for all epochs, so that such a stage is one long epoch of the Trainer, in
an order that is fixed beforehand.

Example::

    plan_steps(batches=90, accumulation=1, epochs=1.0, eval_every=0.25).evaluations
    order = LimitedOrder.of(stage, {"a": 30, "b": 60}, seed=0)
    order.plan(batch_size=8, epochs=2.0, eval_every=0.25)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.utils.data import Sampler

from trainer.algorithms.base import Stage
from trainer.data.batches import DataOrder
from trainer.data.schedule import Schedule, stage_schedule, uneven_schedule


def plan_steps(*, batches: int, accumulation: int, epochs: float, eval_every: float) -> Schedule:
    """Return the steps of a stage; an epoch has ``batches``, ``accumulation`` to a step."""
    steps = math.ceil(batches / accumulation)
    return stage_schedule(examples=steps, batch_size=1, eval_every=eval_every, epochs=epochs)


@dataclass(frozen=True, kw_only=True)
class LimitedOrder:
    """The order of a stage whose sub-datasets have limits."""

    places: tuple[int, ...]
    """The rows of all epochs, as indices in the data set of the stage."""
    epoch_sizes: tuple[int, ...]
    """The rows of each epoch; the last epoch may be partial."""

    @classmethod
    def of(cls, stage: Stage, sizes: Mapping[str, int], *, seed: int) -> LimitedOrder:
        """Return the order of a stage; ``sizes`` are the rows of its sub-datasets, in order."""
        total = sum(sizes.values())
        order = DataOrder.fresh(
            seed=seed, stage=stage.number, sizes=sizes, batch_size=total, limits=stage.limits
        )
        starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        epoch_sizes = order.epoch_sizes(stage.epochs)
        epochs = (order.step(epoch) for epoch in range(len(epoch_sizes)))
        places = tuple(starts[name] + row for epoch in epochs for name, row in epoch)
        return cls(places=places, epoch_sizes=epoch_sizes)

    def plan(self, *, batch_size: int, epochs: float, eval_every: float) -> Schedule:
        """Return the steps of the stage; a step has ``batch_size`` rows, the last one the rest."""
        rows = uneven_schedule(self.epoch_sizes, batch_size=1, eval_every=eval_every, epochs=epochs)
        steps = math.ceil(rows.steps / batch_size)

        def step_of(row: int) -> int:
            return min(steps, max(1, round(row / batch_size)))

        inside = {step_of(row) for row in rows.evaluations} - {steps}
        ends = {end: step_of(row) for end, row in rows.ends}
        return Schedule(
            steps_per_epoch=step_of(rows.steps_per_epoch),
            steps=steps,
            evaluations=(*sorted(inside), steps),
            ends=tuple(ends.items()),
        )


class PlacesSampler(Sampler[int]):
    """A sampler that yields the rows of a :class:`LimitedOrder`."""

    def __init__(self, order: LimitedOrder) -> None:
        """Yield the rows of ``order``, once."""
        self._order = order

    def __iter__(self) -> Iterator[int]:
        """Return an iterator over the rows."""
        return iter(self._order.places)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._order.places)
