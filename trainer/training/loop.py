"""Train stage after stage and act on the decisions of a strategy.

At the root of a stage, at the evaluations of its schedule and at its end, the loop evaluates the
sub-datasets, saves a rollback point and asks the strategy. With ``evaluation.excluded_every`` most
evaluations measure the active sub-datasets alone and carry the values of the others forward.
The decision is journaled before the loop acts on it. If it is to continue, training continues while
the rollback point is saved. Evaluation and decision are journaled once that is durable, at the
latest before the next one is saved, before a resume point is written, or before the loop acts on
another decision.

Invariant: everything between two decisions depends only on the seed and the position, so a run that
is resumed from a position repeats the same steps.

Example::

    with open_workspace(config) as work, Interrupts() as interrupts:
        stop = Loop(work, strategy, interrupts, state).run()
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
from accelerate.utils import set_seed

from trainer.algorithms.base import (
    Average,
    Continue,
    Decision,
    Divergence,
    RollBack,
    Skip,
    Stop,
    measured,
)
from trainer.algorithms.divergence import NonFiniteNumber, all_non_finite
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import margin_warnings
from trainer.config.schema import OVERALL
from trainer.distributed import any_of, share, share_decision
from trainer.errors import RunError
from trainer.model.answers import AnswerRule
from trainer.model.evaluate import EvaluationResult, Evaluator
from trainer.model.optim import reset_optimizer
from trainer.signals import Interrupted, Interrupts
from trainer.training import resume_point
from trainer.training.decisions import Decisions, Place
from trainer.training.observe import StageObserver
from trainer.training.predictions import write_predictions
from trainer.training.progress import Heartbeat, StageProgress
from trainer.training.replay import (
    KnownEvaluation,
    ObservationLog,
    Position,
    ResumePoint,
    RunState,
    StageStart,
)
from trainer.training.rollback_points import (
    PendingSave,
    begin_stage,
    restore_average,
    restore_point,
    save_rollback_point,
)
from trainer.training.stage import (
    StagePlan,
    count_examples,
    find_carried,
    make_schedule,
    plan_stage,
)
from trainer.training.steps import StageSteps
from trainer.training.workspace import Workspace

_log = logging.getLogger(__name__)

_TELLING = 2
"""Evaluations without a right answer after which a warning shows one."""
_SHOWN = 200
"""Characters of a text that a warning shows."""


class Loop:
    """Trains stage after stage until the strategy stops."""

    def __init__(
        self,
        work: Workspace,
        strategy: Method,
        interrupts: Interrupts,
        state: RunState,
        *,
        progress: bool = False,
    ) -> None:
        """Create it at the state of a run; ``progress`` shows a bar if stderr is a terminal."""
        self._work = work
        self._interrupts = interrupts
        self._has_bar = progress and work.accelerator.is_main_process and sys.stderr.isatty()
        self._beat = Heartbeat(is_silent=not work.accelerator.is_main_process)
        self._evaluator = Evaluator(
            work.config.evaluation,
            work.loaded,
            work.accelerator,
            work.metrics,
            check=self._check,
        )
        self._decisions = Decisions(strategy, work.journal_queue, state)
        self._starts = dict(state.starts)
        self._observations = state.observations
        self._changes = state.changes
        self._observer = StageObserver(work, strategy)
        self._sizes = work.train_sizes
        self._global_step = state.global_step
        self._position: Position | None = None
        self._evaluations = len(state.known)
        self._exact = [
            name for name, one in work.metrics.metrics.items() if one.name == "exact_match"
        ]
        known = [known.metrics for known in state.known.values()]
        self._base_metrics = known[0] if known else None
        self._has_right_answer = not self._exact or any(map(self._has_right, known))

    def run(self, position: Position | None = None) -> Stop:
        """Train the current stage, from a position in it or from its root, and those after it.

        The model holds the weights of the stage's root, or those of the resume point. Raises
        :class:`Interrupted` on a signal; a resume point is written first if a stage has begun.
        """
        start = self._starts[max(self._starts)]
        try:
            while True:
                decision = self._train_stage(start, position)
                if isinstance(decision, Stop):
                    return decision
                self._position = position = None
                start = StageStart(stage=decision.stage, root=decision.checkpoint)
                self._starts[start.stage.number] = start
                begin_stage(self._work, start, self._decisions.make_policy())
        except Interrupted:
            if self._position is not None:
                self._save_resume_point(self._position)
            raise

    def _train_stage(self, start: StageStart, position: Position | None) -> RollBack | Stop:
        """Train one stage, from its root or from a position in it, and return the last decision."""
        stage = start.stage
        schedule = make_schedule(self._work.config, stage, self._sizes)
        plan = None
        if self._work.accelerator.is_main_process:  # only the main process knows all evaluations
            plan = plan_stage(
                self._work.config, self._sizes, stage.number, self._starts, self._decisions.known
            )
        plan = cast(StagePlan, share_decision(plan))
        steps = StageSteps(
            self._work, stage, schedule, order=plan.order, steps_before=plan.steps_before
        )
        self._begin_observing(steps, is_new=position is None)
        if position is None:
            decision = self._begin_stage(steps, start.root)
            if isinstance(decision, RollBack | Stop):
                return decision
            position = Position(
                stage=stage.number, step=0, global_step=self._global_step, evaluations=1
            )
        self._position, first_step = position, position.step
        every = self._work.config.resume_every
        with StageProgress(
            self._beat,
            stage=stage.number,
            first_step=first_step,
            steps=schedule.steps,
            has_bar=self._has_bar,
        ) as progress:
            while True:
                if schedule.evaluations[position.evaluations - 1] == position.step:
                    self._record_totals(steps, position)
                    progress.show(steps.mean_loss())
                    decision = self._evaluate(steps, position)
                    if isinstance(decision, RollBack | Stop):
                        return decision
                    if isinstance(decision, Skip):
                        continue
                    position = replace(position, evaluations=position.evaluations + 1)
                    self._position = position
                if every and position.step % every == 0 and position.step != first_step:
                    self._record_totals(steps, position)
                    self._save_resume_point(position)
                finding = steps.train(position.step)
                self._global_step += 1
                position = replace(position, step=position.step + 1, global_step=self._global_step)
                self._position = position
                progress.advance(position.step, loss=steps.mean_loss)
                if finding is None and self._observer.is_due(step=position.step):
                    self._record_totals(steps, position)
                    self._observer.observe(position)
                self._finish_step(steps, position, is_last=finding is not None)
                if finding is not None:
                    decision = self._handle_divergence(finding, steps, position)
                    if isinstance(decision, Stop):
                        return decision

    def _begin_observing(self, steps: StageSteps, *, is_new: bool) -> None:
        """Apply what was observed and changed in the stage before, if it is not new."""
        if is_new:
            self._observations, self._changes = ObservationLog(self._sizes), ()
        for step, changed in self._changes:
            steps.change(step, changed)
        self._observer.begin_stage(steps, self._observations)

    def _check(self) -> None:
        """Show that an evaluation goes on, and end it on a signal."""
        self._beat.tick("evaluating")
        # With several processes an evaluation cannot end early, because the other processes would
        # wait forever for the share of a process that ended.
        if self._work.accelerator.num_processes == 1:
            self._interrupts.check()

    def _begin_stage(self, steps: StageSteps, root: str | None) -> Decision:
        """Start a stage and decide on its root.

        Only the base, from which the first stage starts, is evaluated and committed here. The
        evaluation of any other root is known, and is made again if it carried values. The optimizer
        starts fresh unless its state was restored with the root.
        """
        work, stage = self._work, steps.stage
        if root is None or not work.config.restores_optimizer:
            self._reset_optimizer(stage.number)
        result = None
        if root is None:
            self._beat.say("evaluating the model before training")
            result = self._run_evaluation()
        elif share(bool(work.journal and self._decisions.known[root].carried)):
            result = self._run_evaluation()
            write_predictions(work, result, stage=stage.number, epoch=0.0)
        finding = all_non_finite(result.losses) if result and root is None else None
        if finding is not None:
            raise RunError(
                f"the {finding.what} is {finding.value} before any training: is model.path "
                f"{work.config.model.path} sound, and is model.dtype wide enough for it?"
            )
        save = self._save_rollback_point(steps, 0, result) if result and root is None else None
        # The record of the stage names its root, so this commit must be durable first.
        committed = save.wait() if save else {}
        checkpoint = committed.get("checkpoint", root)
        work.record(
            "stage_started",
            step=self._global_step,
            stage=stage.number,
            root=checkpoint,
            active=list(stage.active),
            shares=dict(stage.shares),
            limits=dict(stage.limits),
            floor=stage.floor,
            epochs=stage.epochs,
            steps=steps.schedule.steps,
            examples=sum(count_examples(work.config, stage, self._sizes).values()),
        )
        if work.accelerator.is_main_process:
            if result and root is None:
                self._warn_of_margins(result)
            _log.info("stage %d trains %s", stage.number, ", ".join(stage.trained))
        if committed:
            work.record("committed", **committed)
        return self._decide(steps, 0, result, checkpoint)

    def _warn_of_margins(self, result: EvaluationResult) -> None:
        sizes = {name: len(rows) for name, rows in self._work.split("validation").items()}
        for line in margin_warnings(self._work.config, result.metrics, result.errors, sizes):
            _log.warning("%s", line)

    def _evaluate(self, steps: StageSteps, position: Position) -> Decision:
        """Evaluate the sub-datasets that are due, save a rollback point, and decide."""
        index = position.evaluations
        carried = find_carried(
            self._work.config,
            steps.stage,
            self._sizes,
            index=index,
            is_last=index == len(steps.schedule.evaluations),
        )
        result = self._run_evaluation(carried)
        finding = all_non_finite(result.losses)
        if finding is not None:
            return self._handle_divergence(finding, steps, position)
        self._work.journal_queue.flush()
        save = self._save_rollback_point(steps, index, result, carried)
        decision = self._decide(steps, index, result, save, carried)
        if isinstance(decision, Continue) and decision.stage is not None:
            steps.change(position.step, decision.stage)
        return decision

    def _handle_divergence(
        self, finding: NonFiniteNumber, steps: StageSteps, position: Position
    ) -> Skip | Stop:
        """Ask the strategy what to do after a divergence; on a skip, restore the checkpoint."""
        work, stage, answer = self._work, steps.stage, None
        if work.accelerator.is_main_process:
            divergence = Divergence(
                stage=stage.number,
                epoch=steps.schedule.epoch(position.step),
                step=position.global_step,
                **vars(finding),
            )
            answer = self._decisions.on_divergence(divergence, index=position.evaluations - 1)
        decision: Skip | Stop = share_decision(answer)
        if isinstance(decision, Skip):
            restore_point(work, decision.checkpoint)
            if not work.config.restores_optimizer:
                self._reset_optimizer(stage.number, position.step)
        return decision

    def _reset_optimizer(self, *place: int) -> None:
        """Reset the optimizer, and seed the generators from the run's seed and the place."""
        words = np.random.SeedSequence([self._work.config.seed, *place]).generate_state(1)
        set_seed(int(words[0]), device_specific=self._work.accelerator.num_processes > 1)
        reset_optimizer(self._work.optimizer)

    def _run_evaluation(self, carried: Collection[str] = ()) -> EvaluationResult:
        """Evaluate the model on all sub-datasets but those whose values are ``carried``."""
        with self._work.snapshots.as_committed():
            every = self._work.split("validation")
            validation = {name: rows for name, rows in every.items() if name not in carried}
            result = self._evaluator(self._work.model, validation, self._base_metrics)
            self._base_metrics = self._base_metrics or result.metrics
            self._evaluations += 1
            self._has_right_answer |= self._has_right(result.metrics)
            if self._evaluations == _TELLING and not self._has_right_answer:
                self._warn_of_answers()
        return result

    def _has_right(self, metrics: Mapping[str, float]) -> bool:
        return any(metrics.get(name, 0) > 0 for name in self._exact)

    def _warn_of_answers(self) -> None:
        """Show a generation beside its reference, because no answer was right so far."""
        settings = self._work.config.evaluation
        name = self._exact[0]
        examples = self._work.split("validation")[name]
        text = self._evaluator.generate(self._work.model, examples[0])
        rule, reference = AnswerRule.of(settings), examples[0].reference
        found = "evaluation.answer_pattern is not set, so these whole texts are the answers"
        if settings.answer_pattern:
            found = (
                f"evaluation.answer_pattern {settings.answer_pattern!r} finds "
                f"{rule.find(text)[:_SHOWN]!r} in the first and "
                f"{rule.find(reference)[:_SHOWN]!r} in the second"
            )
        if self._work.accelerator.is_main_process:
            _log.warning(
                "warning: no answer was right in %d evaluations. For an example of %s the model "
                "generates %r; the reference is %r. %s. If these should be equal, change "
                "answer_pattern, answer or max_new_tokens",
                _TELLING,
                name,
                text[:_SHOWN],
                reference[:_SHOWN],
                found,
            )

    def _save_rollback_point(
        self,
        steps: StageSteps,
        index: int,
        result: EvaluationResult,
        carried: Collection[str] = (),
    ) -> PendingSave | None:
        """Write the generations and commit the weights with their metrics, in the main process."""
        stage, epoch = steps.stage.number, steps.epoch_at(index)
        write_predictions(self._work, result, stage=stage, epoch=epoch)
        return self._commit(steps, index, result, carried)

    def _commit(
        self,
        steps: StageSteps,
        index: int,
        result: EvaluationResult,
        carried: Collection[str] = (),
    ) -> PendingSave | None:
        """Commit the weights with the metrics that were measured, in the main process.

        So no carried value is ranked in the store.
        """
        work = self._work
        if work.timeline is not None:
            work.timeline.retention = work.limit_policy(self._decisions.make_policy())
        return save_rollback_point(
            work,
            stage=steps.stage.number,
            step=self._global_step,
            epoch=steps.epoch_at(index),
            metrics=measured(result.metrics, carried),
        )

    def _decide(
        self,
        steps: StageSteps,
        index: int,
        result: EvaluationResult | None,
        checkpoint: PendingSave | str | None,
        carried: Collection[str] = (),
    ) -> Decision:
        """Ask the strategy about an evaluation, journal both, and share the answer.

        ``checkpoint`` is the pending rollback point, or the id of a durable one. Without a
        ``result``, the metrics are known from an earlier evaluation. Those of ``carried`` are those
        of the evaluation before.
        """
        answer: Decision | None = None
        if self._work.accelerator.is_main_process and checkpoint is not None:
            place = self._place(steps, index)
            known = self._nothing_known(place)
            if isinstance(checkpoint, str):
                known = self._decisions.known.get(checkpoint, known)
            if result is not None:
                known = self._add_result(known, result, carried)
            cost = result.cost_fields() if result else None
            answer = self._decisions.decide(place, known, checkpoint=checkpoint, cost=cost)
        decision: Decision = share_decision(answer)
        while isinstance(decision, Average):
            decision = self._average(steps, index, decision)
        return decision

    def _average(self, steps: StageSteps, index: int, average: Average) -> Decision:
        """Evaluate and commit an average of checkpoints, and ask the strategy about it.

        Training does not continue after it, so the model may keep the weights of the average.
        """
        work = self._work
        self._beat.say(f"evaluating an average of {len(average.weights)} checkpoints")
        restore_average(work, average.weights)
        result = self._run_evaluation()
        save = self._commit(steps, index, result)
        answer: Decision | None = None
        if save is not None:
            place = self._place(steps, index)
            answer = self._decisions.decide_average(
                place,
                self._add_result(self._nothing_known(place), result, ()),
                average,
                committed=save.wait(),
                cost=result.cost_fields(),
            )
        decision: Decision = share_decision(answer)
        return decision

    def _place(self, steps: StageSteps, index: int) -> Place:
        return Place(
            stage=steps.stage.number,
            index=index,
            epoch=steps.epoch_at(index),
            step=self._global_step,
            last=index == len(steps.schedule.evaluations),
        )

    def _nothing_known(self, place: Place) -> KnownEvaluation:
        step = 0 if self._position is None else self._position.step
        return KnownEvaluation(metrics={}, losses={}, stage=place.stage, step=step)

    def _add_result(
        self, known: KnownEvaluation, result: EvaluationResult, carried: Collection[str]
    ) -> KnownEvaluation:
        """Return a known evaluation with a result, and with the values that it carries forward."""
        metrics, losses, errors = result.metrics, result.losses, result.errors
        if carried:
            before, mixture = self._decisions.last, self._work.metrics.mixture
            metrics, losses, errors = (
                {**old, **new}
                for old, new in (
                    (before.metrics, metrics),
                    (before.losses, losses),
                    (before.errors, errors),
                )
            )
            sizes = {name: len(rows) for name, rows in self._work.split("validation").items()}
            metrics[OVERALL] = mixture.compute_overall(metrics, sizes, self._base_metrics)
        return replace(
            known, metrics=metrics, losses=losses, errors=errors, carried=sorted(carried)
        )

    def _finish_step(self, steps: StageSteps, position: Position, *, is_last: bool) -> None:
        """Journal the totals that are due; on a signal, raise unless this step ``is_last``."""
        self._work.journal_queue.write_ready()
        number = self._interrupts.number
        signalled = any_of(number is not None, self._work.accelerator) and not is_last
        if signalled or is_last or position.step % self._work.config.log_every == 0:
            self._record_totals(steps, position)
        if signalled:
            raise Interrupted(number or signal.SIGTERM)

    def _record_totals(self, steps: StageSteps, position: Position) -> None:
        epoch = steps.schedule.epoch(position.step)
        totals = steps.take_totals()
        if totals is not None:
            place = {"step": position.global_step, "stage": position.stage, "epoch": epoch}
            self._work.record("trained", **place, **totals)

    def _save_resume_point(self, position: Position) -> None:
        """Replace the resume point; every process adds its random number generators."""
        work = self._work
        self._observer.write_losses(position)
        work.journal_queue.flush()
        seq = 0 if work.journal is None else work.journal.next_seq - 1
        size = resume_point.save(work, ResumePoint(position=position, seq=seq))
        place = {"step": position.global_step, "stage": position.stage}
        work.record("resume_point", **place, bytes=size)
