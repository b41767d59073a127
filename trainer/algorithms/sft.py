"""Plain supervised fine-tuning: one stage on the whole mixture; the best overall is the result.

Example::

    strategy = Sft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
"""

from __future__ import annotations

from trainer.algorithms.base import Continue, Decision, Evaluation
from trainer.algorithms.method import Method


class Sft(Method):
    """Train on the whole mixture in one stage."""

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up, then stop with the best overall."""
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        return self.stop(why="the compute budget is used up")
