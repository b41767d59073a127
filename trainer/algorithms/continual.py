"""Continual fine-tuning: one sub-dataset after the other, each for the compute budget.

A baseline of the MSFT paper (arXiv 2603.21606), which gives no details; this is our reading. Each
sub-dataset has its own stage, in the given order. A stage begins at the end of the one before, with
a fresh optimizer as in MSFT. The result is the first best overall checkpoint of the whole run.

Example::

    strategy = Continual(sub_datasets=["dates", "arith"], mode="max", compute_budget=3.0)
    strategy.first_stage().active                               # ("dates",)
"""

from __future__ import annotations

from trainer.algorithms.base import Continue, Decision, Evaluation, Needs, Stage
from trainer.algorithms.method import Method


class Continual(Method):
    """Train on one sub-dataset after the other, in the order of ``sub_datasets``."""

    def first_stage(self) -> Stage:
        """Return the stage of the first sub-dataset."""
        return self._stage(1)

    def own_needs(self) -> Needs:
        """Return the best overall and the newest checkpoint, which may be the next root."""
        return Needs(newest=True)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue to the end of the stage, then begin that of the next sub-dataset."""
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        done = self.stage.active
        if self.stage.number == len(self.sub_datasets):
            return self.stop(exclude=done, why=f"{done[0]} was the last sub-dataset")
        stage = self._stage(self.stage.number + 1)
        reason = f"{done[0]} is done; {stage.active[0]} follows"
        return self.roll_back(evaluation, stage, reason=reason)

    def _stage(self, number: int) -> Stage:
        name = [*self.sub_datasets][number - 1]
        return Stage(number=number, active=(name,), epochs=self.compute_budget)
