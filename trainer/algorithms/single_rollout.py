"""Single roll-out search: one roll-out finds all peaks; a second one stops each sub-dataset there.

A baseline of the MSFT paper (arXiv 2603.21606, "SRO"). The first stage trains on the mixture for
the compute budget and finds each sub-dataset's peak, its first best evaluation. The second stage
begins at the base with another order of the examples and leaves each sub-dataset out from its peak
on; the batches stay full. A sub-dataset that was best at the end of the roll-out, or had no finite
metric, stays to the end. The result is the first best overall checkpoint of both stages.

With a ``floor`` (Soft SRO) the second stage keeps that share of a sub-dataset's examples in each
epoch from its peak on, instead of leaving it out.

Example::

    strategy = SingleRollout(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.algorithms.base import Continue, Decision, Evaluation, Needs, Stage
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import first_best_index


@dataclass(kw_only=True, eq=False)
class SingleRollout(Method):
    """Find all peaks in one roll-out, then train from the base with them."""

    floor: float = 0.0
    """Share of its examples that a sub-dataset keeps after its peak; 0: none, as in the paper."""

    def own_needs(self) -> Needs:
        """Return the best overall, and the base until the second stage has begun."""
        base = () if self.stage.number > 1 or self.is_over else self.evaluations[:1]
        return Needs(checkpoints=tuple(e.checkpoint for e in base), newest=self.best is None)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue to the end of the stage; after the first stage roll back to the base."""
        if not evaluation.last:
            return Continue(reason="within the compute budget")
        if self.stage.number > 1:
            return self.stop(why="the second run is over")
        limits = self._limits()
        if not limits:
            return self.stop(why="nobody peaked before the end, so a second run would be the same")
        active = tuple(name for name in self.stage.active if limits.get(name) != 0)
        if not active:
            return self.stop(why="every sub-dataset was at its best before any training")
        peaks = ", ".join(f"{name} at epoch {epoch:.4g}" for name, epoch in sorted(limits.items()))
        stage = Stage(
            number=2,
            active=active,
            epochs=max(limits.get(name, evaluation.epoch) for name in active),
            shares={name: self.floor for name in sorted(limits) if name not in active}
            if self.floor
            else {},
            limits={name: limits[name] for name in active if name in limits},
            floor=self.floor,
        )
        kept = f"keeps {self.floor:.3g} of each" if self.floor else "leaves each out"
        reason = f"peaks: {peaks}; the second run {kept} from there on"
        return self.roll_back(self.evaluations[0], stage, reason=reason)

    def _limits(self) -> dict[str, float]:
        """Return the epochs of the peaks before the last evaluation, by sub-dataset."""
        limits = {}
        for name in self.stage.active:
            values = [one.metrics[name] for one in self.evaluations]
            index = first_best_index(values, self.modes.get(name, self.mode))
            if index is not None and index < len(self.evaluations) - 1:
                limits[name] = self.evaluations[index].epoch
        return limits
