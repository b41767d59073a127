"""Ask the strategy about an evaluation, and journal both.

The records of an evaluation wait in the journal's queue until its checkpoint is durable. The
strategy decides at once, on a name of the checkpoint whose id is not known yet.

Invariant: every decision but *continue* is journaled before this returns it.

Example::

    decisions = Decisions(strategy, work.journal_queue, state)
    decision = decisions.decide(facts, known, save=pending, cost=result.cost_fields())
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msft_store import Policy
from trainer.algorithms.base import (
    Average,
    Continue,
    Decision,
    Divergence,
    Evaluation,
    Skip,
    Stop,
    measured,
)
from trainer.algorithms.divergence import non_finite_metrics
from trainer.algorithms.method import Method
from trainer.config.schema import OVERALL
from trainer.journal import JournalQueue, Line
from trainer.training.progress import describe_values
from trainer.training.replay import KnownEvaluation, RunState, describe_decision
from trainer.training.rollback_points import PendingSave, make_policy

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of an evaluation in a run."""

    stage: int
    index: int
    """0 for the root of the stage."""
    epoch: float
    """Epochs of the active mixture since the stage began."""
    step: int
    """Optimizer steps since the run began."""
    last: bool
    """True if the compute budget of the stage is used up."""


class Decisions:
    """The decisions of a run, in the main process."""

    def __init__(self, strategy: Method, queue: JournalQueue, state: RunState) -> None:
        """Continue at the state of a run, whose evaluations the strategy has seen."""
        self._strategy = strategy
        self._queue = queue
        self.names = state.names
        """The names under which the strategy knows checkpoints."""
        self.known = dict(state.known)
        """Checkpoint id → its evaluation."""

    @property
    def last(self) -> Evaluation:
        """The last evaluation of the current stage."""
        return self._strategy.evaluations[-1]

    def make_policy(self) -> Policy:
        """Return the retention policy that keeps all that the strategy may still use."""
        return make_policy(self._strategy.needs(), self._strategy.mode, self.names)

    def decide(
        self,
        place: Place,
        known: KnownEvaluation,
        *,
        checkpoint: PendingSave | str,
        cost: Mapping[str, Any] | None,
    ) -> Decision:
        """Return the strategy's decision on an evaluation, with the id of its checkpoint.

        ``checkpoint`` is the pending rollback point, or the id of a durable one. ``cost`` has the
        fields of the ``evaluated`` record that count tokens; without it the results were known.
        """
        save = checkpoint if isinstance(checkpoint, PendingSave) else None
        durable = checkpoint if isinstance(checkpoint, str) else ""
        evaluation = Evaluation(
            **vars(place),
            checkpoint=self.names.name(durable, stage=place.stage, index=place.index),
            metrics=known.metrics,
            errors=known.errors,
            losses=known.losses or {},
            carried=known.carried,
        )
        # A decision to roll back begins the next stage in the strategy.
        seen, active = [*self._strategy.evaluations, evaluation], self._strategy.stage.active
        decision = self._strategy.on_evaluation(evaluation)

        def make_lines() -> list[Line]:
            committed = save.wait() if save else {}
            identity = committed.get("checkpoint", durable)
            self.names.add(evaluation.checkpoint, identity)
            self.known[identity] = known
            evaluated = {
                **vars(evaluation),
                "checkpoint": identity,
                "split": "validation",
                "losses": known.losses,
                "reused": cost is None,
                **(cost or {}),
            }
            lines = [("evaluated", evaluated), self._decided(place, self.names.resolve(decision))]
            return [("committed", committed), *lines] if committed else lines

        self._queue.add_later(save.future if save else None, make_lines)
        if not isinstance(decision, Continue):
            self._queue.flush()
        values = describe_values(seen, active, self._strategy.mode, self._strategy.modes)
        _log_decision(evaluation, values, decision)
        return self.names.resolve(decision)

    def decide_average(
        self,
        place: Place,
        known: KnownEvaluation,
        average: Average,
        *,
        committed: Mapping[str, Any],
        cost: Mapping[str, Any],
    ) -> Decision:
        """Return the strategy's decision on an average that it requested, and journal both.

        ``committed`` has the fields of the ``committed`` record of the mean, which is durable.
        """
        evaluation = Evaluation(
            **vars(place),
            checkpoint=average.checkpoint,
            metrics=known.metrics,
            errors=known.errors,
            losses=known.losses or {},
        )
        identity = committed["checkpoint"]
        self.names.add(average.checkpoint, identity)
        self.known[identity] = known
        decision = self.names.resolve(self._strategy.on_average(evaluation))
        self._queue.add("committed", **committed)
        averaged = {
            **vars(evaluation),
            "name": average.checkpoint,
            "checkpoint": identity,
            "weights": dict(average.weights),
            "split": "validation",
            "losses": known.losses,
            **cost,
        }
        self._queue.add("averaged", **averaged)
        event, fields = self._decided(place, decision)
        self._queue.add(event, **fields)
        _log_decision(evaluation, "", decision)
        return decision

    def on_divergence(self, divergence: Divergence, *, index: int) -> Skip | Stop:
        """Return the strategy's decision after a divergence; ``index`` is the last evaluation's."""
        # A checkpoint can only be restored once it is durable and its id is known.
        self._queue.flush()
        self._queue.add("diverged", **vars(divergence))
        answer = self.names.resolve(self._strategy.on_divergence(divergence))
        self._queue.add(
            "decided",
            step=divergence.step,
            stage=divergence.stage,
            index=index,
            **describe_decision(answer),
        )
        _log.info("stage %d, epoch %.2f: %s", divergence.stage, divergence.epoch, answer.reason)
        return answer

    def _decided(self, place: Place, decision: Decision) -> Line:
        where = {"step": place.step, "stage": place.stage, "index": place.index}
        return "decided", {**where, **describe_decision(decision)}


def _log_decision(evaluation: Evaluation, values: str, decision: Decision) -> None:
    metrics, carried = evaluation.metrics, evaluation.carried
    text = f"stage {evaluation.stage}, epoch {evaluation.epoch:.2f}: {OVERALL}"
    text += f" {metrics[OVERALL]:.4f}{' with carried values' if carried else ''}"
    if not_finite := non_finite_metrics(measured(metrics, carried)):
        text += f"; not finite: {', '.join(not_finite)}"
    if not isinstance(decision, Continue) or decision.stage is not None:
        text += f"; {decision.reason}"
    _log.info("%s", f"{text}\n{values}" if values else text)
