"""Parts that the strategies share: the best overall checkpoint and the check of the order.

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
    """The first evaluation with the best overall metric."""

    def __init__(self, mode: Mode) -> None:
        """Start without an evaluation."""
        self._mode: Mode = mode
        self._best: Evaluation | None = None

    @property
    def found(self) -> bool:
        """Return True if any evaluation had a finite overall metric."""
        return self._best is not None

    def add(self, evaluation: Evaluation) -> None:
        """Add an evaluation."""
        best = None if self._best is None else self._best.metrics[OVERALL]
        if is_better(evaluation.metrics[OVERALL], best, self._mode):
            self._best = evaluation

    def result(self, *, otherwise: Evaluation) -> tuple[str, str]:
        """Return the best checkpoint, or else that of ``otherwise``, and the reason."""
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
    """A base class for methods that request no observations."""

    def on_observation(self, observation: Observation) -> Adjustment:
        """Raise ``ValueError``, because this method requests no observations."""
        raise ValueError(f"stage {observation.stage} is not observed")


def check_order(evaluation: Evaluation, *, stage: Stage, index: int, over: bool) -> None:
    """Raise ``ValueError`` if an evaluation does not follow the one before."""
    if over:
        raise ValueError("the run is over, no evaluation can follow")
    if (evaluation.stage, evaluation.index) != (stage.number, index):
        raise ValueError(
            f"expected evaluation {index} of stage {stage.number}, "
            f"got evaluation {evaluation.index} of stage {evaluation.stage}"
        )
