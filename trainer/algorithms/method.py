"""The base class of the training methods: one place for stages, the result and the end of a run.

A method gets evaluations and returns one decision from a closed set. It imports neither torch nor
accelerate and does no I/O. So every method can be tested on recorded curves, and a run is resumed
by passing the recorded evaluations to a new one.

A deterministic run that rolls back and repeats its steps diverges again. So after a divergence it
rolls back to the last evaluation and skips the batches since then (as PaLM did, arXiv 2204.02311,
section 5.1). After ``max_skips`` skips the run stops with the best checkpoint so far.

Example::

    class Once(Method):
        def decide(self, evaluation: Evaluation) -> Decision:
            if not evaluation.last:
                return Continue(reason="within the compute budget")
            return self.stop(why="the compute budget is used up")
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from trainer.algorithms.averages import AveragePool, Weights
from trainer.algorithms.base import (
    Adjustment,
    Average,
    Continue,
    Decision,
    Divergence,
    Evaluation,
    Mode,
    Needs,
    Observation,
    RollBack,
    Skip,
    Stage,
    Stop,
)
from trainer.algorithms.peaks import is_better
from trainer.config.schema import OVERALL, AverageConfig


@dataclass(kw_only=True, eq=False)
class Method(ABC):
    """A training method; a derived class decides at each evaluation.

    The result of the run is the first best overall checkpoint, or an average of checkpoints that is
    better. Of those that are equal to the base, it is the one with the lowest mean loss. An
    evaluation with carried values does not count for it. If a stage begins from such a checkpoint,
    it is measured in full there, and counts. The state of a method follows from the calls alone: a
    new instance that gets the same calls again returns the same decisions.

    Attributes:
        sub_datasets: The sub-datasets; there must be one.
        mode: The direction in which the overall metric improves.
        modes: The directions of sub-datasets' metrics that differ from it.
        compute_budget: C, epochs of the active mixture in one stage.
        max_skips: Times that the whole run may skip batches after a divergence; 0 to stop at once.
        average: The average of checkpoints that may become the result.
        stage: The current stage.
        evaluations: The evaluations of the current stage so far.
        best: The first evaluation of the run with the best overall metric, if any was finite.
        is_over: True if the method has stopped the run.
    """

    sub_datasets: Collection[str]
    mode: Mode
    modes: Mapping[str, Mode] = field(default_factory=dict)
    compute_budget: float
    max_skips: int = 0
    average: AverageConfig = field(default_factory=lambda: AverageConfig(kind="none"))
    stage: Stage = field(init=False)
    evaluations: list[Evaluation] = field(init=False, default_factory=list)
    best: Evaluation | None = field(init=False, default=None)
    is_over: bool = field(init=False, default=False)
    _skips: int = field(init=False, default=0)
    _base: Evaluation | None = field(init=False, default=None)
    _unranked: set[str] = field(init=False, default_factory=set)
    """The checkpoints whose first evaluation had carried values; the store does not rank them."""
    _made: list[Weights] = field(init=False, default_factory=list)
    _stop: Stop | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.sub_datasets:
            raise ValueError("no sub-dataset to train on")
        self._pool = AveragePool(settings=self.average, mode=self.mode, modes=self.modes)
        self.stage = self.first_stage()

    def first_stage(self) -> Stage:
        """Return the first stage of the run, by default on the whole mixture."""
        return Stage(number=1, active=tuple(sorted(self.sub_datasets)), epochs=self.compute_budget)

    def needs(self) -> Needs:
        """Return the checkpoints to keep now; they may change with every decision."""
        needs = self.own_needs()
        if self._pool.is_used and (self._stop is not None or not self.is_over):
            # The averages of a run that has stopped are still to be made, by evaluated checkpoints.
            names = (*needs.checkpoints, *self._pool.needed())
            needs = replace(needs, checkpoints=names, newest=True)
        best = self.best
        if best is not None and (self._ties_with_base or best.checkpoint in self._unranked):
            # The store ranks by the metric, which does not tell these checkpoints apart, or which
            # it has not got.
            named = (*needs.checkpoints, best.checkpoint)
            newest = self._stop is not None or not self.is_over
            needs = replace(needs, best=(), newest=newest, checkpoints=named)
        # After a roll-back its target is the root, which is kept; nothing newer can be needed.
        may_skip = self._skips < self.max_skips and self.evaluations and not self.is_over
        return replace(needs, newest=True) if may_skip else needs

    def own_needs(self) -> Needs:
        """Return the checkpoints to keep if nothing diverges.

        These are the best overall, or the newest while no overall metric was finite.
        """
        return Needs(newest=self.best is None)

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Record the next evaluation and decide how the run continues.

        Args:
            evaluation: The evaluation; index 0 is the stage's root.

        Returns:
            A decision; never ``Continue`` if ``evaluation.last`` is true.

        Raises:
            ValueError: If the evaluation does not follow the one before.
        """
        if self.is_over:
            raise ValueError("the run is over, no evaluation can follow")
        stage, index = self.stage.number, len(self.evaluations)
        if (evaluation.stage, evaluation.index) != (stage, index):
            raise ValueError(
                f"expected evaluation {index} of stage {stage}, "
                f"got evaluation {evaluation.index} of stage {evaluation.stage}"
            )
        self.evaluations.append(evaluation)
        self._base = self._base or evaluation
        self._pool.add(evaluation)
        if evaluation.carried:
            self._unranked.add(evaluation.checkpoint)
        self._compare(evaluation)
        decision = self.decide(evaluation)
        return self._average_first(decision) if isinstance(decision, Stop) else decision

    def on_average(self, evaluation: Evaluation) -> Decision:
        """Decide after the evaluation of the average that the last decision named."""
        self._compare(evaluation)
        if self._stop is not None:
            self._pool.add_result(self._made[-1], evaluation)
            return self._average_first(self._stop)
        decision = self.decide_average(evaluation)
        return self._average_first(decision) if isinstance(decision, Stop) else decision

    def decide_average(self, evaluation: Evaluation) -> Decision:
        """Decide after an average that :meth:`decide` requested; by default it requests none."""
        raise ValueError(f"no average was requested, got {evaluation.checkpoint}")

    def make_average(self, weights: Weights, *, reason: str) -> Average:
        """Return the decision to average checkpoints, with a name for their mean."""
        self._made.append(weights)
        return Average(checkpoint=f"mean.{len(self._made)}", weights=weights, reason=reason)

    def _average_first(self, stop: Stop) -> Average | Stop:
        """Return the next average that may become the result, or the decision to stop."""
        weights = self._pool.propose() if self.best is not None else None
        if weights is not None and (self.average.kind == "greedy" or weights not in self._made):
            self._stop = stop
            reason = f"{stop.reason}; first evaluate the average of {len(weights)} checkpoints"
            return self.make_average(weights, reason=reason)
        found, self._stop = self.best, None
        if found is None or found.checkpoint == stop.checkpoint:
            return stop
        value = found.metrics[OVERALL]
        reason = f"{stop.reason}; an average of checkpoints is better, {value:.4g}, and the result"
        return replace(stop, checkpoint=found.checkpoint, reason=reason)

    def _compare(self, evaluation: Evaluation) -> None:
        """Make an evaluation the best overall if it is better; carried values do not count."""
        best = None if self.best is None else self.best.metrics[OVERALL]
        if evaluation.carried:
            return
        if is_better(evaluation.metrics[OVERALL], best, self.mode) or self._is_lower(evaluation):
            self.best = evaluation

    @property
    def _ties_with_base(self) -> bool:
        """True if the best overall is no better than the base's, and losses can decide."""
        base, best = self._base, self.best
        if base is None or best is None or best.metrics[OVERALL] != base.metrics[OVERALL]:
            return False
        return any(base.metrics[name] != loss for name, loss in best.losses.items())

    def _is_lower(self, evaluation: Evaluation) -> bool:
        """Return True if an evaluation ties with the base and has the lowest loss so far.

        Where a metric does not tell the base from what was trained, the loss decides.
        """
        best = self.best
        if best is None or not self._ties_with_base or not evaluation.losses:
            return False
        is_tied = evaluation.metrics[OVERALL] == best.metrics[OVERALL]
        return is_tied and math.fsum(evaluation.losses.values()) < math.fsum(best.losses.values())

    @abstractmethod
    def decide(self, evaluation: Evaluation) -> Decision:
        """Decide how the run continues; ``evaluation`` is the last one of ``evaluations``."""

    def on_observation(self, observation: Observation) -> Adjustment:
        """Adjust a stage with ``observe``; a method without one raises ``ValueError``."""
        raise ValueError(f"stage {observation.stage} is not observed")

    def on_divergence(self, divergence: Divergence) -> Skip | Stop:
        """Skip the batches since the last evaluation, or stop if no skips are left."""
        if not self.evaluations:
            raise ValueError("nothing was evaluated, so there is nothing to go back to")
        last = self.evaluations[-1]
        why = f"training diverged: the {divergence.what} is {divergence.value}"
        if self._skips < self.max_skips:
            self._skips += 1
            return Skip(
                checkpoint=last.checkpoint,
                reason=f"{why}; back to epoch {last.epoch:.4g} without the "
                f"{divergence.step - last.step} batches since then, "
                f"number {self._skips} of at most {self.max_skips}",
            )
        if self.max_skips:
            why += f", after going back {self._skips} times already"
        return self.stop(why=why)

    def stop(
        self, *, why: str, exclude: tuple[str, ...] = (), otherwise: Evaluation | None = None
    ) -> Stop:
        """End the run with the best overall.

        If no overall metric was finite, it is ``otherwise``, by default the last evaluation.
        """
        self.is_over = True
        result = self.best or otherwise or self.evaluations[-1]
        if self.best is None:
            why += (
                "; no evaluation of the run has a finite overall metric, so the result is where "
                f"the run stands, stage {result.stage}, epoch {result.epoch:.4g}"
            )
        else:
            why += (
                f"; the result is the best overall, {result.metrics[OVERALL]:.4g} at stage "
                f"{result.stage}, epoch {result.epoch:.4g}"
            )
        return Stop(checkpoint=result.checkpoint, exclude=exclude, reason=why)

    def roll_back(self, target: Evaluation, stage: Stage, *, reason: str) -> RollBack:
        """Begin a stage from an evaluated checkpoint; it excludes what ``stage`` leaves out."""
        changes = self._change_stage(stage)
        self.evaluations = []
        return RollBack(checkpoint=target.checkpoint, stage=stage, reason=reason, **changes)

    def change(self, stage: Stage, *, reason: str) -> Continue:
        """Continue the stage with another active set or other shares."""
        return Continue(stage=stage, reason=reason, **self._change_stage(stage))

    def _change_stage(self, stage: Stage) -> dict[str, tuple[str, ...]]:
        """Take the stage as the current one; return the names that leave and that come back."""
        before, self.stage = self.stage.active, stage
        return {
            "exclude": tuple(name for name in before if name not in stage.active),
            "include": tuple(name for name in stage.active if name not in before),
        }
