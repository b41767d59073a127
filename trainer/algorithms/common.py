"""What the strategies share: the best overall checkpoint, and checks of what they are told.

Example::

    best = BestOverall("max")
    best.add(evaluation)
    checkpoint, why = best.result(otherwise=evaluation)
"""

from __future__ import annotations

from trainer.algorithms.base import Adjustment, Evaluation, Mode, Observation, Stage
from trainer.algorithms.peaks import is_better
from trainer.config.schema import OVERALL


class BestOverall:
    """The first best overall evaluation of all that were added."""

    def __init__(self, mode: Mode) -> None:
        """Begin with none."""
        self._mode: Mode = mode
        self._best: Evaluation | None = None

    @property
    def found(self) -> bool:
        """Whether there is a best one yet."""
        return self._best is not None

    def add(self, evaluation: Evaluation) -> None:
        """Take an evaluation into account."""
        best = None if self._best is None else self._best.metrics[OVERALL]
        if is_better(evaluation.metrics[OVERALL], best, self._mode):
            self._best = evaluation

    def result(self, *, otherwise: Evaluation) -> tuple[str, str]:
        """Return a checkpoint and why: the best, or ``otherwise`` where no overall was finite."""
        best = self._best
        if best is None:
            return (
                otherwise.checkpoint,
                "no evaluation of the run has a finite overall metric, so the result is where the "
                f"run stands, stage {otherwise.stage}, epoch {otherwise.epoch:.4g}",
            )
        return (
            best.checkpoint,
            f"the result is the best overall, {best.metrics[OVERALL]:.4g} at stage {best.stage}, "
            f"epoch {best.epoch:.4g}",
        )


class Unobserved:
    """A method that is told of evaluations alone."""

    def on_observation(self, observation: Observation) -> Adjustment:
        """Raise ``ValueError``: it has asked for none."""
        raise ValueError(f"stage {observation.stage} is not observed")


def check_order(evaluation: Evaluation, *, stage: Stage, index: int, over: bool) -> None:
    """Raise ``ValueError`` where an evaluation does not follow the one before."""
    if over:
        raise ValueError("the run is over, no evaluation can follow")
    if (evaluation.stage, evaluation.index) != (stage.number, index):
        raise ValueError(
            f"expected evaluation {index} of stage {stage.number}, "
            f"got evaluation {evaluation.index} of stage {evaluation.stage}"
        )
