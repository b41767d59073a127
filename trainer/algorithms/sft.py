"""Plain supervised fine-tuning: one stage on the whole mixture; the best overall is the result.

Example::

    strategy = Sft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.algorithms.base import (
    Continue,
    Decision,
    Evaluation,
    ExampleLosses,
    LookAhead,
    Mode,
    Needs,
    Stage,
    Stop,
)
from trainer.algorithms.common import BestOverall, Unobserved, check_order


class Sft(Unobserved):
    """Train on the whole mixture in one stage.

    Args:
        sub_datasets: The sub-datasets.
        mode: The direction in which the metric improves.
        compute_budget: Epochs of the mixture.
        observe: The observations that a derived method requests.

    Raises:
        ValueError: If there is no sub-dataset.
    """

    def __init__(
        self,
        *,
        sub_datasets: Iterable[str],
        mode: Mode,
        compute_budget: float,
        observe: ExampleLosses | LookAhead | None = None,
    ) -> None:
        """Start a run; see the class."""
        names = tuple(sorted(sub_datasets))
        if not names:
            raise ValueError("no sub-dataset to train on")
        self.mode: Mode = mode
        self._stage = Stage(number=1, active=names, epochs=compute_budget, observe=observe)
        self._count = 0
        self._best = BestOverall(mode)
        self._last: Evaluation | None = None
        self._over = False

    def first_stage(self) -> Stage:
        """Return the only stage."""
        return self._stage

    def needs(self) -> Needs:
        """Return the best overall, because the run never rolls back."""
        return Needs(newest=not self._best.found)

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up, then stop with the best overall."""
        check_order(evaluation, stage=self._stage, index=self._count, over=self._over)
        self._count += 1
        self._best.add(evaluation)
        self._last = evaluation
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        return self.end(why="the compute budget is used up")

    def end(self, *, why: str) -> Stop:
        """Stop after any evaluation, with the best overall so far."""
        if self._last is None:
            raise ValueError("nothing was evaluated, so there is no result")
        self._over = True
        result, words = self._best.result(otherwise=self._last)
        return Stop(checkpoint=result, reason=f"{why}; {words}")
