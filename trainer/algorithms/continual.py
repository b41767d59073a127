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

from trainer.algorithms.base import (
    Continue,
    Decision,
    Evaluation,
    Mode,
    Needs,
    RollBack,
    Stage,
    Stop,
)
from trainer.algorithms.common import BestOverall, Unobserved, check_order


class Continual(Unobserved):
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
        if not self._names:
            raise ValueError("no sub-dataset to train on")
        self.mode: Mode = mode
        self._first = self._stage = Stage(number=1, active=self._names[:1], epochs=compute_budget)
        self._count = 0
        self._best = BestOverall(mode)
        self._last: Evaluation | None = None
        self._over = False

    def first_stage(self) -> Stage:
        """Return the stage of the first sub-dataset."""
        return self._first

    def needs(self) -> Needs:
        """Return the best overall and the newest, which may become the next stage's root."""
        return Needs(newest=True)

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Continue to the end of the stage, then begin that of the next sub-dataset."""
        check_order(evaluation, stage=self._stage, index=self._count, over=self._over)
        self._count += 1
        self._best.add(evaluation)
        self._last = evaluation
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        stage = self._stage
        done = stage.active
        if stage.number == len(self._names):
            return self._stop(exclude=done, why=f"{done[0]} was the last sub-dataset")
        following = self._names[stage.number]
        self._stage = Stage(number=stage.number + 1, active=(following,), epochs=stage.epochs)
        self._count = 0
        return RollBack(
            checkpoint=evaluation.checkpoint,
            exclude=done,
            stage=self._stage,
            reason=f"{done[0]} is done; {following} follows",
        )

    def end(self, *, why: str) -> Stop:
        """Stop after any evaluation, with the best overall so far."""
        return self._stop(exclude=(), why=why)

    def _stop(self, *, exclude: tuple[str, ...], why: str) -> Stop:
        if self._last is None:
            raise ValueError("nothing was evaluated, so there is no result")
        self._over = True
        result, words = self._best.result(otherwise=self._last)
        return Stop(checkpoint=result, exclude=exclude, reason=f"{why}; {words}")
