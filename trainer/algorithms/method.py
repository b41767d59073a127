"""The base class of the training methods: one place for stages, the result and the end of a run.

Example::

    class Once(Method):
        def decide(self, evaluation: Evaluation) -> Decision:
            if not evaluation.last:
                return Continue(reason="within the compute budget")
            return self.end(why="the compute budget is used up")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from trainer.algorithms.base import (
    Adjustment,
    Decision,
    Evaluation,
    Mode,
    Needs,
    Observation,
    RollBack,
    Stage,
    Stop,
)
from trainer.algorithms.peaks import is_better
from trainer.config.schema import OVERALL


class Method(ABC):
    """A training method without divergence handling.

    A derived class decides at each evaluation. The result of the run is the first best overall
    checkpoint.

    Args:
        first_stage: The first stage of the run.
        mode: The direction in which the overall metric improves.
        modes: The directions of sub-datasets' metrics that differ from it.

    Attributes:
        mode: The direction in which the overall metric improves.
        modes: The directions of sub-datasets' metrics that differ from it.
        stage: The current stage.
        evaluations: The evaluations of the current stage so far.
        best: The first evaluation of the run with the best overall metric, if any was finite.
        is_over: True if the method has stopped the run.

    Raises:
        ValueError: If the first stage has no sub-dataset.
    """

    def __init__(
        self, first_stage: Stage, mode: Mode, modes: Mapping[str, Mode] | None = None
    ) -> None:
        """Start a run; see the class."""
        if not first_stage.active:
            raise ValueError("no sub-dataset to train on")
        self.mode: Mode = mode
        self.modes: Mapping[str, Mode] = modes or {}
        self.stage = self._first_stage = first_stage
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None
        self.is_over = False

    def first_stage(self) -> Stage:
        """Return the first stage of the run."""
        return self._first_stage

    def needs(self) -> Needs:
        """Return the best overall, or the newest while no overall metric was finite."""
        return Needs(newest=self.best is None)

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Record the next evaluation and decide how the run continues.

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
        best = None if self.best is None else self.best.metrics[OVERALL]
        if is_better(evaluation.metrics[OVERALL], best, self.mode):
            self.best = evaluation
        return self.decide(evaluation)

    @abstractmethod
    def decide(self, evaluation: Evaluation) -> Decision:
        """Decide how the run continues; ``evaluation`` is the last one of ``evaluations``."""

    def on_observation(self, observation: Observation) -> Adjustment:
        """Adjust a stage with ``observe``; a method without one raises ``ValueError``."""
        raise ValueError(f"stage {observation.stage} is not observed")

    def end(self, *, why: str) -> Stop:
        """Stop after any evaluation of a stage, with the best overall so far."""
        if not self.evaluations:
            raise ValueError("nothing of this stage was evaluated, so it cannot end")
        return self.stop(self.evaluations[-1], why=why)

    def stop(self, otherwise: Evaluation, *, why: str, exclude: tuple[str, ...] = ()) -> Stop:
        """End the run with the best overall, or with ``otherwise`` if no metric was finite."""
        self.is_over = True
        result = self.best or otherwise
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
        exclude = tuple(name for name in self.stage.active if name not in stage.active)
        self.stage, self.evaluations = stage, []
        return RollBack(checkpoint=target.checkpoint, exclude=exclude, stage=stage, reason=reason)
