"""Instance-dependent Early Stopping (IES): stop training on examples that are mastered.

After Yuan et al., ICLR 2025 (arXiv 2502.07547). An example is mastered when the mean of the last
second differences of its loss is below δ; ``docs/ALGORITHMS.md`` has the formula. The set is
computed again after every epoch, from the losses that mastered examples get in forward passes.

Example::

    strategy = Ies(sub_datasets=["arith"], mode="max", compute_budget=8.0)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from trainer.algorithms.base import Adjustment, ExampleLosses, Observation, Stage
from trainer.algorithms.sft import Sft
from trainer.config.schema import IesConfig


@dataclass(kw_only=True, eq=False)
class Ies(Sft):
    """Stop training on mastered examples (arXiv 2502.07547)."""

    settings: IesConfig = field(default_factory=IesConfig)
    """The section ``ies`` of the configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = self.settings.average + 2
        self._epochs: deque[Mapping[str, NDArray[np.float64]]] = deque(maxlen=kept)

    def first_stage(self) -> Stage:
        """Return a stage on the whole mixture that observes the losses of its examples."""
        return replace(super().first_stage(), observe=ExampleLosses())

    def on_observation(self, observation: Observation) -> Adjustment:
        """Return the examples that are mastered after an epoch."""
        losses = {name: np.asarray(row, np.float64) for name, row in observation.values.items()}
        self._epochs.append(losses)
        mastered = {
            name: tuple(np.flatnonzero(is_mastered(rows, self.settings.delta)).tolist())
            for name in losses
            if (rows := [epoch[name] for epoch in self._epochs])
        }
        count = sum(map(len, mastered.values()))
        total = sum(map(len, losses.values()))
        return Adjustment(
            mastered={name: places for name, places in mastered.items() if places},
            reason=f"{count} of {total} examples are mastered after epoch {observation.epoch:.4g}",
        )


def is_mastered(losses: Sequence[NDArray[np.float64]], delta: float) -> NDArray[np.bool_]:
    """Return a mask of the mastered examples.

    ``losses`` has one array of shape (examples,) per epoch, in order. With fewer than three epochs
    no example is mastered, and never one with a loss that is not finite.
    """
    if len(losses) < 3:
        return np.zeros(losses[-1].shape, bool)
    with np.errstate(invalid="ignore"):
        second: NDArray[np.float64] = np.abs(np.diff(np.stack(losses), n=2, axis=0))
        found: NDArray[np.bool_] = second.mean(axis=0) < delta
    return found
