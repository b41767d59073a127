"""What a stage's observations have found so far, from the records that tell it.

The records of a stage tell each example's loss once an epoch, and what a look ahead found. The loop
and a resume both follow them here, so that both stand at the same point.

Example::

    found = Observed({"arith": 900})
    found.add_losses({"arith": [17, 4]}, {"arith": [0.7, 1.2]})
    observation = found.observation(stage=1, step=40, epoch=1.0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.journal import Record
from trainer.strategy import Adjustment, Observation


class Observed:
    """The observations of one stage."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Begin without any; ``sizes`` are the training examples of the sub-datasets."""
        self._losses: dict[str, NDArray[np.float64]] = {
            name: np.full(size, np.nan) for name, size in sizes.items()
        }
        self._values: Mapping[str, Sequence[float]] | None = None
        self.adjustments: list[tuple[int, Adjustment]] = []
        """Steps in the stage, and what holds from there on."""

    def add_losses(
        self, places: Mapping[str, Sequence[int]], values: Mapping[str, Sequence[float]]
    ) -> None:
        """Take the losses of examples into account, by their places in the sub-datasets."""
        self._values = None
        for name, row in places.items():
            self._losses[name][list(row)] = values[name]

    def add_values(self, values: Mapping[str, Sequence[float]]) -> None:
        """Take what a look ahead found into account."""
        self._values = values

    def observation(self, *, stage: int, step: int, epoch: float) -> Observation:
        """Return what a strategy is told: the look ahead, or the last known loss of each example.

        A loss that is not known yet is NaN.
        """
        values: Mapping[str, Sequence[float]]
        if self._values is not None:
            values = self._values
        else:
            values = {name: losses.tolist() for name, losses in self._losses.items()}
        return Observation(stage=stage, step=step, epoch=epoch, values=values)

    def read(self, record: Record) -> Observation | None:
        """Follow a record; return the observation that an ``adjusted`` one has answered."""
        if record["event"] == "losses":
            self.add_losses(record["places"], record["values"])
        elif record["event"] == "looked_ahead":
            self.add_values(record["values"])
        elif record["event"] == "adjusted":
            return self.observation(
                stage=record["stage"], step=record["stage_step"], epoch=record["epoch"]
            )
        return None


def describe_adjustment(adjustment: Adjustment) -> dict[str, Any]:
    """Return the fields of an ``adjusted`` record that say what was decided."""
    return {
        "weights": dict(adjustment.weights),
        "mastered": {name: list(places) for name, places in adjustment.mastered.items()},
    }
