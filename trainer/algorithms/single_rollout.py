"""Single roll-out search: one roll-out finds all peaks; a second one stops each sub-dataset there.

A baseline of the MSFT paper (arXiv 2603.21606, "SRO"). The first stage trains on the mixture for
the compute budget and finds each sub-dataset's peak, its first best evaluation. The second stage
begins at the base with another order of the examples and leaves each sub-dataset out from its peak
on; the batches stay full. A sub-dataset that was best at the end of the roll-out, or had no finite
metric, stays to the end. The result is the first best overall checkpoint of both stages.

Example::

    strategy = SingleRollout(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
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
from trainer.algorithms.peaks import first_best_index


class SingleRollout(Unobserved):
    """Find all peaks in one roll-out, then train from the base with them.

    Args:
        sub_datasets: The sub-datasets.
        mode: The direction in which the metric improves.
        compute_budget: Epochs of the mixture in the roll-out.

    Raises:
        ValueError: If there is no sub-dataset.
    """

    def __init__(self, *, sub_datasets: Iterable[str], mode: Mode, compute_budget: float) -> None:
        """Start a run; see the class."""
        names = tuple(sorted(sub_datasets))
        if not names:
            raise ValueError("no sub-dataset to train on")
        self.mode: Mode = mode
        self._first = self._stage = Stage(number=1, active=names, epochs=compute_budget)
        self._base: Evaluation | None = None
        self._seen: list[Evaluation] = []
        self._best = BestOverall(mode)
        self._over = False

    def first_stage(self) -> Stage:
        """Return the roll-out."""
        return self._first

    def needs(self) -> Needs:
        """Return the best overall, and the base until the second stage has begun."""
        needs_base = self._base is not None and self._stage is self._first and not self._over
        held = (self._base.checkpoint,) if self._base and needs_base else ()
        return Needs(checkpoints=held, newest=not self._best.found)

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Continue to the end of the stage; after the first stage roll back to the base."""
        check_order(evaluation, stage=self._stage, index=len(self._seen), over=self._over)
        self._seen.append(evaluation)
        self._best.add(evaluation)
        self._base = self._base or evaluation
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        if self._stage is not self._first:
            return self.end(why="the second run is over")
        limits = self._limits()
        if not limits:
            return self.end(why="nobody peaked before the end, so a second run would be the same")
        active = tuple(name for name in self._first.active if limits.get(name) != 0)
        if not active:
            return self.end(why="every sub-dataset was at its best before any training")
        told = ", ".join(f"{name} at epoch {epoch:.4g}" for name, epoch in sorted(limits.items()))
        self._stage = Stage(
            number=2,
            active=active,
            epochs=max(limits.get(name, evaluation.epoch) for name in active),
            limits={name: limits[name] for name in active if name in limits},
        )
        self._seen = []
        return RollBack(
            checkpoint=self._base.checkpoint,
            exclude=tuple(name for name in self._first.active if name not in active),
            stage=self._stage,
            reason=f"peaks: {told}; the second run leaves each out from there on",
        )

    def end(self, *, why: str) -> Stop:
        """Stop after any evaluation, with the best overall so far."""
        if not self._seen:
            raise ValueError("nothing of this stage was evaluated, so it cannot end")
        self._over = True
        result, words = self._best.result(otherwise=self._seen[-1])
        return Stop(checkpoint=result, reason=f"{why}; {words}")

    def _limits(self) -> dict[str, float]:
        """Return the epochs of the peaks before the last evaluation, by sub-dataset."""
        limits = {}
        for name in self._first.active:
            index = first_best_index(
                [evaluation.metrics[name] for evaluation in self._seen], self.mode
            )
            if index is not None and index < len(self._seen) - 1:
                limits[name] = self._seen[index].epoch
        return limits
