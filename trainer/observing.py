"""A stage that its strategy watches: losses and looks ahead are recorded, answered and acted on.

What is found is written before the strategy is asked, and its answer before it is acted on, so that
a resume tells it the same and gets the same.

Example::

    observing = Observing(work, strategy, together)
    observing.begin(stage, steps, schedule, observed)
    if observing.is_due(step=position.step):
        observing.observe(position)
"""

from __future__ import annotations

import time

from trainer.lookahead import look_ahead
from trainer.observed import Observed, describe_adjustment
from trainer.resume import Position
from trainer.schedule import Schedule
from trainer.steps import StageSteps
from trainer.strategy import Adjustment, ExampleLosses, LookAhead, Stage, Strategy
from trainer.together import Together
from trainer.workspace import Workspace


class Observing:
    """Asks a strategy how a stage with ``observe`` goes on."""

    def __init__(self, work: Workspace, strategy: Strategy, together: Together) -> None:
        """Prepare; :meth:`begin` follows for each stage."""
        self._work = work
        self._strategy = strategy
        self._together = together

    def begin(
        self, stage: Stage, steps: StageSteps, schedule: Schedule, observed: Observed
    ) -> None:
        """Begin a stage, or go on with one in which so much was ``observed``."""
        self._stage, self._steps, self._schedule = stage, steps, schedule
        self._observed = observed
        for step, adjustment in observed.adjustments:
            steps.adjust(step, adjustment)

    def is_due(self, *, step: int) -> bool:
        """Say whether there is something to ask after so many steps of the stage."""
        watch = self._stage.observe
        if watch is None or step >= self._schedule.steps:
            return False
        every = self._schedule.steps_per_epoch if isinstance(watch, ExampleLosses) else watch.every
        return step % every == 0

    def observe(self, position: Position) -> None:
        """Find out, ask, and adjust what the stage trains on."""
        watch = self._stage.observe
        if isinstance(watch, LookAhead):
            self._look_ahead(position, watch)
        else:
            self.write_losses(position)
        answer: Adjustment | None = None
        if self._work.accelerator.is_main_process:
            observation = self._observed.observation(
                stage=position.stage,
                step=position.step,
                epoch=self._schedule.epoch(position.step),
            )
            answer = self._strategy.on_observation(observation)
            self._work.record(
                "adjusted",
                step=position.global_step,
                stage=position.stage,
                stage_step=position.step,
                epoch=observation.epoch,
                **describe_adjustment(answer),
                reason=answer.reason,
            )
        adjustment: Adjustment = self._together.share(answer)
        self._steps.adjust(position.step, adjustment)

    def write_losses(self, position: Position) -> None:
        """Record the losses of examples since the last time, so that a resume knows them."""
        told = self._steps.take_losses()
        if told is None:
            return
        places, values = told
        self._observed.add_losses(places, values)
        place = {"step": position.global_step, "stage": position.stage}
        self._work.record("losses", **place, places=places, values=values)

    def _look_ahead(self, position: Position, watch: LookAhead) -> None:
        began = time.monotonic()
        rewards, cost = look_ahead(
            self._work,
            self._stage,
            step=position.step,
            lr=self._steps.lr(position.step),
            examples=watch.examples,
        )
        values = {name: [reward] for name, reward in rewards.items()}
        self._observed.add_values(values)
        self._work.record(
            "looked_ahead",
            step=position.global_step,
            stage=position.stage,
            values=values,
            **vars(cost),
            seconds=time.monotonic() - began,
        )
