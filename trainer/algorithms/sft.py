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
    Stage,
)
from trainer.algorithms.method import Method


class Sft(Method):
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
        active = tuple(sorted(sub_datasets))
        super().__init__(
            Stage(number=1, active=active, epochs=compute_budget, observe=observe), mode
        )

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up, then stop with the best overall."""
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        return self.end(why="the compute budget is used up")
