"""Instance-dependent Early Stopping (IES): stop training on examples that are mastered.

After Yuan et al., ICLR 2025 (arXiv 2502.07547). With L(t) an example's loss in epoch t, the second
difference is Δ²L(t) = L(t) - 2 L(t-1) + L(t-2). An example is mastered when the mean of its last
``average`` |Δ²L|, or of as many as there are, is below δ. Mastered examples keep their place in the
epoch but get only a forward pass, so that their losses stay known. The set is computed again after
every epoch, so an example whose loss changes again is trained on again.

The first second difference is known after three epochs, so a run of fewer epochs is plain SFT.

Example::

    strategy = Ies(sub_datasets=["arith"], mode="max", compute_budget=8.0, delta=0.01)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.algorithms.base import Adjustment, ExampleLosses, Mode, Observation
from trainer.algorithms.sft import Sft


class Ies(Sft):
    """Stop training on mastered examples (arXiv 2502.07547).

    Args:
        sub_datasets: The sub-datasets.
        mode: The direction in which the metric improves.
        compute_budget: Epochs of the mixture.
        delta: δ, in units of the mean token loss.
        average: Second differences that the mean is taken over.
    """

    def __init__(
        self,
        *,
        sub_datasets: Iterable[str],
        mode: Mode,
        compute_budget: float,
        delta: float,
        average: int = 3,
    ) -> None:
        """Start a run; see the class."""
        super().__init__(
            sub_datasets=sub_datasets,
            mode=mode,
            compute_budget=compute_budget,
            observe=ExampleLosses(),
        )
        self._delta = delta
        self._epochs: deque[Mapping[str, NDArray[np.float64]]] = deque(maxlen=average + 2)

    def on_observation(self, observation: Observation) -> Adjustment:
        """Return the examples that are mastered after an epoch."""
        losses = {name: np.asarray(row, np.float64) for name, row in observation.values.items()}
        self._epochs.append(losses)
        mastered = {
            name: tuple(np.flatnonzero(is_mastered(rows, self._delta)).tolist())
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
