"""The callback that runs one stage inside a Trainer's ``train()``.

It reads the steps of the stage when training begins, requests an evaluation of all sub-datasets
when one is due, commits the weights with the metrics, asks the strategy, and ends the training when
the strategy does not continue. With several processes the main process decides for all.

Invariant: an evaluation is always at an optimizer step, and at least one step is between two.

Example::

    callback = StageCallback(session, reader, eval_every=0.25, seed=0)
    trainer = make_trainer(..., callbacks=[callback])
    callback.attach(trainer)
    trainer.train()
    callback.decision                                  # roll back, or stop
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.algorithms.base import Continue, Decision, RollBack, Stop
from trainer.data.schedule import Schedule
from trainer.errors import ConfigError, RunError
from trainer.hf.metrics import MetricReader
from trainer.hf.plan import LimitedOrder, plan_steps
from trainer.hf.session import RunSession
from trainer.hf.token_counter import TokenCounter
from trainer.training.decisions import Place


class StageCallback(TrainerCallback):
    """Evaluates, commits and ends one stage of a run in the user's own Trainer."""

    def __init__(
        self,
        session: RunSession,
        reader: MetricReader,
        *,
        eval_every: float,
        seed: int,
        order: LimitedOrder | None = None,
    ) -> None:
        """Prepare a stage.

        Args:
            session: The run.
            reader: Finds the metrics in the Trainer's reports.
            eval_every: Epochs between evaluations.
            seed: Seed of the stage's order and of all its random numbers.
            order: The order of a stage that leaves sub-datasets out from an epoch on.
        """
        self._order = order
        self._session = session
        self._stage = session.start.stage
        self._reader = reader
        self._eval_every = eval_every
        self._seed = seed
        self._counter = TokenCounter()
        self._trainer: Any = None
        self._schedule: Schedule | None = None
        self._first_step = session.global_step
        self._index = 0
        """The number of the next evaluation."""
        self._is_due = False
        self._reports: dict[str, Mapping[str, Any]] = {}
        self._recorded_step = 0
        self._lr = 0.0
        self._clock = time.monotonic()
        self.decision: RollBack | Stop | None = None
        """The decision that ended the stage."""

    def attach(self, trainer: Any) -> None:
        """Follow the Trainer that has this callback."""
        self._trainer = trainer
        self._counter.attach(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the evaluations of the stage, and decide on its root if that is known."""
        if self._trainer is None:
            raise RunError("make_trainer must give the callbacks that it gets to the Trainer")
        self._check_arguments(args)
        # What happened in this process before must not change the stage.
        set_seed(self._seed, device_specific=args.world_size > 1)
        epochs, batches = self._stage.epochs, len(kwargs["train_dataloader"])
        accumulation = args.gradient_accumulation_steps
        if self._order is None:
            self._schedule = plan_steps(
                batches=batches,
                accumulation=accumulation,
                epochs=epochs,
                eval_every=self._eval_every,
            )
        else:
            batch_size = args.train_batch_size * accumulation * args.world_size
            self._schedule = self._order.plan(
                batch_size=batch_size, epochs=epochs, eval_every=self._eval_every
            )
        self._session.begin_stage(self._schedule)
        self._clock = time.monotonic()
        if self._session.start.root is None:
            self._is_due = True  # eval_on_start makes the Trainer evaluate the base
        else:
            self._act(self._session.decide_root(self._place(index=0)), control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request an evaluation if one is due."""
        self._session.global_step = self._first_step + state.global_step
        self._lr = float(kwargs["optimizer"].param_groups[0]["lr"])
        if self.decision is not None or self._schedule is None:
            control.should_training_stop = True
            return
        control.should_save = False
        if state.global_step == self._schedule.evaluations[self._index - 1]:
            self._is_due = control.should_evaluate = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the steps since the last record when the Trainer logs a training loss."""
        if "loss" in (kwargs.get("logs") or {}) and self.decision is None:
            self._record_steps()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Collect the report of one sub-dataset; commit and decide when all are there."""
        report = dict(metrics or {})
        name = self._reader.name_of(report)
        if not self._is_due or name is None:
            return
        self._reports[name] = report
        if len(self._reports) < len(self._reader.names):
            return
        reports, self._reports, self._is_due = self._reports, {}, False
        self._record_steps()
        values = self._reader.read(reports)
        cost = {**self._counter.take_evaluation(), "seconds": values.seconds}
        place = self._place(index=self._index)
        self._act(self._session.decide(place, values, cost), control)
        self._clock = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a training that ended without a decision."""
        if self.decision is None:
            raise RunError(
                f"the Trainer ended stage {self._stage.number} after step "
                f"{state.global_step}, before its last evaluation: remove callbacks that stop "
                "training, and max_steps, from make_trainer"
            )

    def _check_arguments(self, args: TrainingArguments) -> None:
        """Raise :class:`ConfigError` for arguments with which a stage would not be one."""
        if args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size would begin a stage again with other batches: set it to "
                "False, and per_device_train_batch_size to a size that fits"
            )
        if args.max_steps > 0:
            raise ConfigError(
                "max_steps would end a stage before its compute budget: make_trainer must pass "
                "its overrides on, which have max_steps=-1"
            )
        if args.deepspeed is not None or self._trainer.is_deepspeed_enabled:
            raise ConfigError(
                "MsftRun does not work with DeepSpeed, whose weights are not in the model: use DDP"
            )

    def _place(self, *, index: int) -> Place:
        """Return the place of an evaluation of the stage."""
        schedule = self._schedule
        if schedule is None:
            raise RunError("a stage has no evaluations before its training begins")
        step = schedule.evaluations[index - 1] if index else 0
        return Place(
            stage=self._stage.number,
            index=index,
            epoch=schedule.epoch(step),
            step=self._first_step + step,
            last=index == len(schedule.evaluations),
        )

    def _record_steps(self) -> None:
        step = self._session.global_step - self._first_step
        steps, self._recorded_step = step - self._recorded_step, step
        if not steps or self._schedule is None:
            return
        now = time.monotonic()
        totals = {
            **self._counter.take_training(steps),
            "lr": self._lr,
            "grad_norm": None,
            "seconds": now - self._clock,
        }
        self._clock = now
        place = Place(
            stage=self._stage.number,
            index=self._index,
            epoch=self._schedule.epoch(step),
            step=self._session.global_step,
            last=False,
        )
        self._session.record_steps(place, totals)

    def _act(self, decision: Decision | None, control: TrainerControl) -> None:
        """Share the main process's decision, and end the training if it does not continue."""
        shared = [decision]
        if self._trainer.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        decided = shared[0]
        self._index += 1
        if isinstance(decided, Continue):
            return
        if not isinstance(decided, RollBack | Stop):
            raise RunError(f"a stage cannot end with {decided!r}")
        self.decision = decided
        control.should_training_stop = True
