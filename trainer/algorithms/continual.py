"""Continual fine-tuning: one sub-dataset after the other, each for the compute budget.

A baseline of the MSFT paper (arXiv 2603.21606), which gives no details; this is our reading. Each
sub-dataset has its own stage, in the given order. A stage begins at the end of the one before, with
a fresh optimizer as in MSFT. The result is the first best overall checkpoint of the whole run.

Example::

    strategy = Continual(sub_datasets=["dates", "arith"], mode="max", compute_budget=3.0)
    strategy.first_stage().active                               # ("dates",)
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.algorithms.base import Continue, Decision, Evaluation, Mode, Needs, Stage
from trainer.algorithms.method import Method


class Continual(Method):
    """Train on one sub-dataset after the other.

    Args:
        sub_datasets: The sub-datasets in training order.
        mode: The direction in which the metric improves.
        compute_budget: Epochs of each sub-dataset.

    Raises:
        ValueError: If there is no sub-dataset.
    """

    def __init__(self, *, sub_datasets: Iterable[str], mode: Mode, compute_budget: float) -> None:
        """Start a run; see the class."""
        self._names = tuple(sub_datasets)
        super().__init__(Stage(number=1, active=self._names[:1], epochs=compute_budget), mode)

    def needs(self) -> Needs:
        """Return the best overall and the newest checkpoint, which may be the next root."""
        return Needs(newest=True)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue to the end of the stage, then begin that of the next sub-dataset."""
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        number, done = self.stage.number, self.stage.active
        if number == len(self._names):
            return self.stop(evaluation, exclude=done, why=f"{done[0]} was the last sub-dataset")
        following = self._names[number]
        stage = Stage(number=number + 1, active=(following,), epochs=self.stage.epochs)
        return self.roll_back(evaluation, stage, reason=f"{done[0]} is done; {following} follows")
