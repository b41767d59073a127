"""The one training loop: it acts on what a strategy decides.

A stage trains the active sub-datasets from its root with a fresh optimizer and schedule. At the
root, every ``eval_every`` epochs and at the end all sub-datasets are evaluated, the weights are
committed to the timeline, and the strategy is asked; its answer is written to the journal and then
acted on. While it says to continue, training goes on beside the commit, and what was found and
decided is written once that is durable: before the next commit, a resume point, or an answer that
leads elsewhere. Everything in between follows from the seed and the position, so a run that is
continued from a position does what it would have done.

Example::

    with open_workspace(config) as work, Interrupts() as interrupts:
        stop = Loop(work, strategy, interrupts).run(standing)

A bar on stderr that shows how far a stage has come, where that is a terminal.

Example::

    with stage_bar(1, done=0, steps=80, shown=True) as bar:
        bar.update()
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from tqdm import tqdm

from msft_store import Policy
from trainer.algorithms.base import (
    Continue,
    Decision,
    Divergence,
    Evaluation,
    Names,
    RollBack,
    Skip,
    Stage,
    Stop,
    Strategy,
)
from trainer.algorithms.divergence import NonFiniteNumber, names_not_finite, ruined
from trainer.algorithms.peaks import margin_warnings
from trainer.config.schema import OVERALL
from trainer.data.schedule import Schedule
from trainer.distributed import RunProcesses
from trainer.errors import RunError
from trainer.journal import Line
from trainer.model.evaluate import Evaluator, Result
from trainer.model.optim import reset
from trainer.signals import Interrupted, Interrupts
from trainer.training import resume_point
from trainer.training.commits import Committing, begin_commit, retention
from trainer.training.observe import Observing
from trainer.training.replay import Known, Observed, Point, Position, Standing, describe
from trainer.training.stage import Course, course_of, examples_of, fresh_order, schedule_of
from trainer.training.steps import StageSteps
from trainer.training.workspace import Workspace


def stage_bar(number: int, *, done: int, steps: int, shown: bool) -> Any:
    """Return a bar for stage ``number`` that stands at ``done`` of ``steps``."""
    return tqdm(
        desc=f"stage {number}",
        initial=done,
        total=steps,
        unit="step",
        leave=False,
        disable=not (shown and sys.stderr.isatty()),
    )


Say = Callable[[str], None]
"""Gets a line for people now and then."""


class Loop:
    """Trains stage after stage until the strategy stops."""

    def __init__(
        self,
        work: Workspace,
        strategy: Strategy,
        interrupts: Interrupts,
        *,
        say: Say = lambda line: None,
        progress: bool = False,
    ) -> None:
        """Prepare; ``progress`` shows a bar on stderr if that is a terminal."""
        self._work = work
        self._strategy = strategy
        self._interrupts = interrupts
        self._say = say
        self._progress = progress
        self._together = RunProcesses(work.accelerator)
        # A process that ends alone would leave the others waiting for its share.
        check = interrupts.check if self._together.is_one else None
        self._evaluator = Evaluator(
            work.config.evaluation, work.loaded, work.accelerator, check=check
        )
        self._known: dict[str, Known] = {}
        self._begun: dict[int, tuple[Stage, str | None]] = {}
        self._names = Names()
        self._observing = Observing(work, strategy, self._together)
        self._sizes = work.train_sizes
        self._observed = Observed(self._sizes)
        self._global_step = 0
        self._position: Position | None = None

    def run(self, standing: Standing, position: Position | None = None) -> Stop:
        """Train from where the run stands, in the middle of its stage if there is a ``position``.

        The model has the weights of the stage's root, or those of the resume point. Raises
        :class:`Interrupted` on a signal, with a resume point written wherever a stage has begun.
        """
        self._known, self._names = dict(standing.known), standing.names
        self._begun, self._observed = dict(standing.begun), standing.observed
        self._global_step = standing.global_step
        stage, root = standing.stage, standing.root
        try:
            while True:
                decision = self._train_stage(stage, root, position)
                if isinstance(decision, Stop):
                    return decision
                self._position = position = None
                stage, root = decision.stage, decision.checkpoint
                self._begun[stage.number] = (stage, root)
                policy = self._retention()
                self._work.begin_stage(stage.number, root, policy)
        except Interrupted:
            if self._position is not None:
                self._save_point(self._position)
            raise

    def _train_stage(
        self, stage: Stage, root: str | None, position: Position | None
    ) -> RollBack | Stop:
        """Train one stage, from its root or from a position in it, and return how it ends."""
        config = self._work.config
        schedule = schedule_of(config, stage, self._sizes)
        course: Course = self._together.share(self._course(stage))
        steps = StageSteps(
            self._work, stage, schedule, order=course.order, steps_before=course.steps_before
        )
        found = Observed(self._sizes) if position is None else self._observed
        self._observing.begin(stage, steps, schedule, found)
        if position is None:
            decision = self._begin(stage, root, schedule)
            if isinstance(decision, RollBack | Stop):
                return decision
            position = Position(
                stage=stage.number, step=0, global_step=self._global_step, evaluations=1
            )
        steps.restart_clock()
        self._position, begun = position, position.step
        shown = self._progress and self._work.accelerator.is_main_process
        with stage_bar(stage.number, done=begun, steps=schedule.steps, shown=shown) as bar:
            while True:
                if schedule.evaluations[position.evaluations - 1] == position.step:
                    self._record_totals(steps, position, schedule)
                    decision = self._evaluate(stage, position, schedule)
                    if isinstance(decision, RollBack | Stop):
                        return decision
                    if isinstance(decision, Skip):
                        continue
                    position = replace(position, evaluations=position.evaluations + 1)
                    self._position = position
                    steps.restart_clock()
                if self._is_point_due(position) and position.step != begun:
                    self._record_totals(steps, position, schedule)
                    self._save_point(position)
                    steps.restart_clock()
                finding = steps.train(position.step)
                self._global_step += 1
                position = replace(position, step=position.step + 1, global_step=self._global_step)
                self._position = position
                bar.update()
                if finding is None and self._observing.is_due(step=position.step):
                    self._record_totals(steps, position, schedule)
                    self._observing.observe(position)
                    steps.restart_clock()
                self._after_step(steps, position, schedule, is_last=finding is not None)
                if finding is not None:
                    decision = self._diverge(finding, stage, position, schedule)
                    if isinstance(decision, Stop):
                        return decision

    def _begin(self, stage: Stage, root: str | None, schedule: Schedule) -> Decision:
        """Start a stage, from fresh state unless its root's was restored, and decide on its root.

        The base, where the first stage begins, is evaluated and committed; any other root is known.
        """
        if root is None or not self._work.config.restores_optimizer:
            self._reset(stage.number)
        result = self._measure() if root is None else None
        finding = ruined(result.losses) if result else None
        if finding is not None:
            raise RunError(
                f"the {finding.what} is {finding.value} before any training: is model.path "
                f"{self._work.config.model.path} sound, and is model.dtype wide enough for it?"
            )
        if result:
            sizes = {name: len(rows) for name, rows in self._work.split("validation").items()}
            for line in margin_warnings(self._work.config, result.metrics, result.errors, sizes):
                self._say(line)
        commit = self._commit(stage, 0.0, result) if result else None
        # The stage is told by its root, so there is nothing to do beside this commit.
        committed = commit.record() if commit else {}
        checkpoint = committed.get("checkpoint", root)
        self._work.record(
            "stage_started",
            step=self._global_step,
            stage=stage.number,
            root=checkpoint,
            active=list(stage.active),
            shares=dict(stage.shares),
            limits=dict(stage.limits),
            epochs=stage.epochs,
            steps=schedule.steps,
            examples=sum(examples_of(self._work.config, stage, self._sizes).values()),
        )
        self._say(f"stage {stage.number} trains {', '.join(stage.trained)}")
        if committed:
            self._work.record("committed", **committed)
        return self._decide(stage, 0, 0.0, result, checkpoint, last=False)

    def _evaluate(self, stage: Stage, position: Position, schedule: Schedule) -> Decision:
        """Evaluate all sub-datasets, commit the weights, and decide."""
        result = self._measure()
        finding = ruined(result.losses)
        if finding is not None:
            return self._diverge(finding, stage, position, schedule)
        self._work.journal_queue.settle()
        epoch = schedule.epoch(position.step)
        commit = self._commit(stage, epoch, result)
        index = position.evaluations
        last = index == len(schedule.evaluations)
        return self._decide(stage, index, epoch, result, commit, last=last)

    def _diverge(
        self, finding: NonFiniteNumber, stage: Stage, position: Position, schedule: Schedule
    ) -> Skip | Stop:
        """Decide what follows numbers that are not finite; where that is to skip, do it."""
        work, answer = self._work, None
        if work.accelerator.is_main_process:
            # A checkpoint that is restored must be durable, and its id known.
            work.journal_queue.settle()
            divergence = Divergence(
                stage=stage.number,
                epoch=schedule.epoch(position.step),
                step=position.global_step,
                what=finding.what,
                value=finding.value,
            )
            work.record("diverged", **vars(divergence))
            answer = self._names.resolve(self._strategy.on_divergence(divergence))
            place = {"step": position.global_step, "stage": stage.number}
            index = position.evaluations - 1
            told = describe(answer)
            work.record("decided", **place, index=index, **told, reason=answer.reason)
            self._say(f"stage {stage.number}, epoch {divergence.epoch:.2f}: {answer.reason}")
        decision: Skip | Stop = self._together.share(answer)
        if isinstance(decision, Skip):
            work.restore(decision.checkpoint)
            if not work.config.restores_optimizer:
                self._reset(stage.number, position.step)
        return decision

    def _reset(self, *place: int) -> None:
        """Make optimizer and generators as good as new, the latter from the seed and a place."""
        words = np.random.SeedSequence([self._work.config.seed, *place]).generate_state(1)
        set_seed(int(words[0]), device_specific=self._work.accelerator.num_processes > 1)
        reset(self._work.optimizer)

    def _measure(self) -> Result:
        with self._work.snapshots.as_committed():
            return self._evaluator(self._work.model, self._work.split("validation"))

    def _commit(self, stage: Stage, epoch: float, result: Result) -> Committing | None:
        """Commit the weights with their metrics, in the main process."""
        if self._work.timeline is not None:
            self._work.timeline.retention = self._work.limited(self._retention())
        step, metrics = self._global_step, result.metrics
        return begin_commit(self._work, stage=stage.number, step=step, epoch=epoch, metrics=metrics)

    def _retention(self) -> Policy:
        return retention(self._strategy.needs(), self._strategy.mode, self._names)

    def _decide(
        self,
        stage: Stage,
        index: int,
        epoch: float,
        result: Result | None,
        checkpoint: Committing | str | None,
        *,
        last: bool,
    ) -> Decision:
        """Ask the strategy about an evaluation, journal both, and tell all processes the answer.

        ``checkpoint`` is the commit, or the id of one that is durable. Without a ``result`` its
        metrics are known from an earlier evaluation.
        """
        if not self._work.accelerator.is_main_process or checkpoint is None:
            told: Decision = self._together.share(None)
            return told
        commit = checkpoint if isinstance(checkpoint, Committing) else None
        durable = checkpoint if isinstance(checkpoint, str) else ""
        known = self._known[durable] if result is None else self._new(result, stage)
        evaluation = Evaluation(
            stage=stage.number,
            index=index,
            epoch=epoch,
            step=self._global_step,
            checkpoint=self._names.name(durable, stage=stage.number, index=index),
            metrics=known.metrics,
            errors=known.errors,
            last=last,
        )
        decision = self._strategy.on_evaluation(evaluation)

        def lines() -> list[Line]:
            committed = commit.record() if commit else {}
            identity = committed.get("checkpoint", durable)
            self._names.add(evaluation.checkpoint, identity)
            self._known[identity] = known
            evaluated = {
                **vars(evaluation),
                "checkpoint": identity,
                "split": "validation",
                "losses": known.losses,
                "reused": result is None,
                **(result.costs() if result else {}),
            }
            decided = {
                "step": evaluation.step,
                "stage": stage.number,
                "index": index,
                **describe(self._names.resolve(decision)),
                "reason": decision.reason,
            }
            written = [("evaluated", evaluated), ("decided", decided)]
            return [("committed", committed), *written] if committed else written

        self._work.journal_queue.add_later(commit.future if commit else None, lines)
        if not isinstance(decision, Continue):
            self._work.journal_queue.settle()
        text = f"stage {stage.number}, epoch {epoch:.2f}: {OVERALL} {known.metrics[OVERALL]:.4f}"
        if unsound := names_not_finite(known.metrics):
            text += f"; not finite: {', '.join(unsound)}"
        self._say(text if isinstance(decision, Continue) else f"{text}; {decision.reason}")
        decided: Decision = self._together.share(self._names.resolve(decision))
        return decided

    def _after_step(
        self, steps: StageSteps, position: Position, schedule: Schedule, *, is_last: bool
    ) -> None:
        """Journal what is due, all where this step ``is_last``, and end on a signal otherwise."""
        self._work.journal_queue.write_ready()
        signalled = self._together.any_of(self._interrupts.number is not None) and not is_last
        if signalled or is_last or position.step % self._work.config.log_every == 0:
            self._record_totals(steps, position, schedule)
        if signalled:
            raise Interrupted(self._interrupts.number or signal.SIGTERM)

    def _is_point_due(self, position: Position) -> bool:
        every = self._work.config.resume_every
        return every is not None and position.step % every == 0

    def _record_totals(self, steps: StageSteps, position: Position, schedule: Schedule) -> None:
        epoch = schedule.epoch(position.step)
        totals = steps.take_totals()
        if totals is not None:
            place = {"step": position.global_step, "stage": position.stage, "epoch": epoch}
            self._work.record("trained", **place, **totals)

    def _save_point(self, position: Position) -> None:
        """Replace the resume point; every process adds its random number generators."""
        work = self._work
        self._observing.write_losses(position)
        work.journal_queue.settle()
        seq = 0 if work.journal is None else work.journal.next_seq - 1
        size = resume_point.save(work, Point(position=position, seq=seq))
        place = {"step": position.global_step, "stage": position.stage}
        work.record("resume_point", **place, bytes=size)

    def _new(self, result: Result, stage: Stage) -> Known:
        step = 0 if self._position is None else self._position.step
        return Known(
            metrics=result.metrics,
            losses=result.losses,
            errors=result.errors,
            stage=stage.number,
            step=step,
        )

    def _course(self, stage: Stage) -> Course | None:
        """Return how a stage begins, in the main process, which knows all evaluations."""
        if not self._work.accelerator.is_main_process:
            return None
        carries = self._work.config.restores_optimizer
        return course_of(
            stage.number,
            self._begun,
            self._known,
            fresh=lambda stage: fresh_order(self._work.config, stage, self._sizes),
            carries=carries,
        )
