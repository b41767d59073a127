"""The store in the place of ``checkpoint-*`` directories: for the Trainer and TRL's trainers.

The callback commits the weights whenever the Trainer would save or evaluates, with the metrics of
that evaluation, and a retention policy decides what stays: a best per dataset costs a few percent
of a checkpoint, not a whole one. Beside them it keeps one resume point: optimizer, schedule,
generators and the Trainer's own state, only the latest. No ``checkpoint-*`` directory is written.

A dictionary of evaluation sets is evaluated one by one; all that the callback gets of them goes
into one commit, under the names that the Trainer gives: ``eval_NAME_loss``. What a trainer names
alike for all sets (``eval_entropy`` of TRL) is there as ``eval_NAME_entropy``, too.

Invariants: there is one commit a step, made when all evaluations of that step are through; the
resume point is of the newest commit or the one before, never ahead of the commits; an error of one
process is raised in all; resuming goes on as if nothing had happened, bit for bit where training
itself is repeatable; nothing is pickled.

Example::

    callback = StoreCallback("run/store", base="Qwen2.5-0.5B", best={"eval_arith_loss": "min"})
    trainer = Trainer(..., callbacks=[callback])
    trainer.train(resume_from_checkpoint=callback.resume("run"))    # None at first
    callback.restore(trainer.model, callback.best("eval_arith_loss"))
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from msft_store._util import PathLike
from msft_store.errors import InvalidInputError, NotAStoreError, UnknownCheckpointError
from msft_store.integrations.hf.commits import RunCommits
from msft_store.integrations.hf.peft import adapter_of, local_model, put_weights, weights_of
from msft_store.integrations.hf.resume_directory import write_folder
from msft_store.integrations.hf.trainer_checks import check_trainer, metrics_of, unknown_metrics
from msft_store.integrations.training_state import (
    from_tensors,
    gathered,
    generators,
    in_main_process,
    names_of,
    set_generators,
    to_tensors,
)
from msft_store.maintenance.export_names import KEY as EXPORT
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.retention import KeepBest, KeepLast, Mode, Policy, default_mode
from msft_store.store import Store
from msft_store.timeline.timeline import Timeline

STATE = "trainer"
"""What the names of a resume point's further tensors begin with."""


class StoreCallback(TrainerCallback):
    """Commits to a store, applies a retention policy, restores the best, resumes.

    ``store`` is one, or its directory, which is made if it is not there. ``base`` is the model that
    training starts from: a directory, a safetensors file, an id of the hub whose model is in the
    cache, or a :class:`Base`; for an adapter leave it out. ``best`` names metrics and their
    directions: the best checkpoint of each stays. ``retention`` is any further policy. ``name``
    tells several runs in one store apart. Without ``resumable`` there is no resume point, only
    weights. With ``background`` training waits for a copy of what is committed in host memory, not
    for the commit. Where the Trainer's other callbacks have state, or a gradient scaler does,
    :meth:`attach` instead of ``callbacks=[…]``.
    """

    def __init__(
        self,
        store: Store | PathLike,
        *,
        base: Base | PathLike | None = None,
        best: Mapping[str, Mode] | None = None,
        retention: Policy | None = None,
        name: str = "main",
        resumable: bool = True,
        background: bool = False,
    ) -> None:
        self.store = store if isinstance(store, Store) else _store_at(store)
        given = base is None or isinstance(base, Base)
        self.base: Base | None = base if given else self.store.add_base(local_model(base))  # type: ignore[assignment,arg-type]
        self.name = name
        self._best = dict(best or {})
        self._retention = retention
        self._resumable = resumable
        self._kept = RunCommits(self.store, name, resumable=resumable, background=background)
        self._trainer: Any = None
        self._model: Any = None
        self._parts: dict[str, Any] = {}
        self._wanted: dict[str, Mode] = {}
        """What ``metric_for_best_model`` asks for."""
        self._metrics: dict[str, float] = {}
        self._due = False
        self._evaluated = False
        """Whether an evaluation was committed, whose metrics are those that there are."""
        self._commits = 0
        self._point: Checkpoint | None = None
        """What is to be resumed, until the Trainer has taken it up."""
        self._state: dict[str, Any] | None = None
        """What that holds besides the weights, until the first step is under way."""
        self._epoch_began: dict[str, Any] | None = None
        """The generators as they were then: some samplers draw an epoch's order from them."""
        self._folder: Path | None = None
        self._asked = False
        """Whether :meth:`resume` was asked what there is to be resumed."""

    def attach(self, trainer: Any) -> StoreCallback:
        """Add this callback to a Trainer, and keep the state of its others; return it."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @property
    def timeline(self) -> Timeline:
        """The commits of the run, once training has begun."""
        return self._kept.timeline

    def resume(self, output_dir: PathLike) -> str | None:
        """Return what ``train(resume_from_checkpoint=…)`` takes up; ``None`` if there is nothing.

        That is a directory in ``output_dir`` for the moment in which the Trainer reads it: the
        weights of the resume point, as plain safetensors, and the Trainer's state. In a group of
        processes each has one of its own.
        """
        self._drop_folder()
        self._asked = True
        self._point = point = self._kept.point()
        if point is None:
            return None
        training = names_of(self.store, point, STATE)
        self._state = state = from_tensors(self.store.load(point, training), STATE)
        names = self.store.tensors(point).keys() - set(training)
        weights = self.store.load(point, sorted(names))
        self._folder = write_folder(output_dir, weights, state["trainer"], adapter=state["adapter"])
        return str(self._folder)

    def best(self, metric: str, mode: Mode | None = None) -> Checkpoint:
        """Return the best of what is kept by a metric; :class:`UnknownCheckpointError` if none.

        ``mode`` is by default what ``best`` or ``metric_for_best_model`` say, and ``min`` for a
        loss; :class:`InvalidInputError` where nobody says it.
        """
        able = [
            checkpoint
            for checkpoint in self._kept.kept()
            if math.isfinite(checkpoint.metrics.get(metric, math.nan))
        ]
        if not able:
            raise UnknownCheckpointError(f"no checkpoint that is kept has the metric {metric!r}")
        known = {**self._wanted, **self._best}.get(metric)
        mode = mode or known or ("min" if default_mode(metric) == "min" else None)
        if mode is None:
            raise InvalidInputError(
                f"is a large {metric!r} good or bad? Say best({metric!r}, 'max') or 'min'"
            )
        sign = 1.0 if mode == "min" else -1.0
        return min(able, key=lambda checkpoint: sign * checkpoint.metrics[metric])

    def restore(self, model: torch.nn.Module, checkpoint: Checkpoint | str) -> None:
        """Give a model the weights of a checkpoint, in place and bit-exact."""
        put_weights(model, self.store, checkpoint)

    def close(self) -> None:
        """Protect the run's checkpoints no longer: a gc with a policy may take them."""
        self._kept.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the timelines, and what is to be resumed."""
        self._drop_folder()
        point, self._point = self._point, None
        # Of an earlier training with this callback, which has failed.
        self._metrics, self._due, self._epoch_began = {}, False, None
        attached = self._trainer is not None
        model, resumable = kwargs["model"], self._resumable
        check_trainer(args, state, model, attached=attached, resumable=resumable)
        self._model = kwargs["model"]
        self._parts = {"optimizer": kwargs.get("optimizer"), "schedule": kwargs.get("lr_scheduler")}
        if self._trainer is not None and getattr(self._trainer.accelerator, "scaler", None):
            self._parts["scaler"] = self._trainer.accelerator.scaler
        self._wanted = {}
        if args.load_best_model_at_end and args.metric_for_best_model:
            wanted = args.metric_for_best_model
            metric = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
            self._wanted = {metric: "max" if args.greater_is_better else "min"}
        used = in_main_process(self._begin)
        at = self._state["trainer"]["global_step"] if self._state is not None else None
        if point is not None and state.global_step == at:
            self._take_up(point, state)
        elif self._commits or used:
            self._model, self._state = None, None
            raise InvalidInputError(
                f"{self.store.path} has a run {self.name!r} already: resume it with "
                "train(resume_from_checkpoint=callback.resume(output_dir)), or give another name"
            )
        else:
            self._state = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what the epoch before has left, and go on with its random numbers."""
        self._flush(state)
        # In the middle of an epoch its order comes first, then the step.
        middle = state.epoch is not None and not float(state.epoch).is_integer()
        self._set_generators(args, "epochs" if middle else "generators")
        self._epoch_began = generators()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what the step before has left, and go on with its random numbers."""
        self._flush(state)
        if self._state is not None and not self._is_over(state):
            if not float(state.epoch or 0).is_integer():
                self._set_generators(args, "generators")
            self._state = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save in the place of the Trainer."""
        if self._state is not None:
            self._undo(state, control)
        self._take_over(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save in the place of the Trainer."""
        self._take_over(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what the Trainer has saved all the same."""
        if self._model is not None:
            self._due = True
            warnings.warn(
                f"a callback after StoreCallback made the Trainer write checkpoint-"
                f"{state.global_step}: put it before StoreCallback in callbacks=[…]",
                stacklevel=2,
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the metrics for the commit; each of several datasets comes here by itself."""
        # Before the first step after a resume it is one more of what the resume point has.
        if self._model is None or self._state is not None:
            return
        self._metrics |= metrics_of(metrics or {})
        self._due = True
        self._take_over(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what is left; with ``load_best_model_at_end``, restore the best."""
        self._flush(state)
        in_main_process(self._kept.wait)
        if self._wanted:
            best = in_main_process(self._wanted_best)
            if best is not None:
                self.restore(self._model, best)
            else:
                warnings.warn(
                    f"no evaluation gave a finite {next(iter(self._wanted))!r}: the weights stay "
                    "those of the last step",
                    stacklevel=2,
                )
        self._model, self._state = None, None

    def _begin(self) -> bool:
        """Make the timelines; return whether there are commits."""
        directions = [*self._best.items(), *self._wanted.items()]
        policy: Policy = KeepLast(1)
        for metric, mode in directions:
            policy = policy | KeepBest(metric, 1, mode=mode)
        if self._retention is not None:
            policy = policy | self._retention
        return self._kept.begin(self.base, policy, anew=self._asked)

    def _wanted_best(self) -> str | None:
        try:
            return self.best(next(iter(self._wanted))).id
        except UnknownCheckpointError:
            return None

    def _take_over(self, control: TrainerControl) -> None:
        if control.should_save:
            control.should_save, self._due = False, True

    def _flush(self, state: TrainerState) -> None:
        """Commit, if an evaluation or a save was due since the last commit."""
        if not self._due:
            return
        if self._trainer is not None:
            self._trainer.store_flos()
        rows = gathered((generators(), self._epoch_began)) if self._resumable else []
        metrics, self._metrics, self._due = self._metrics, {}, False
        if metrics and not self._evaluated:
            self._evaluated = True
            for line in unknown_metrics([*self._best, *self._wanted], metrics):
                warnings.warn(line, stacklevel=2)
        self._commits += 1
        in_main_process(lambda: self._commit(state, metrics, rows))

    def _commit(self, state: TrainerState, metrics: dict[str, float], rows: list[Any]) -> None:
        adapter = adapter_of(self._model)
        said = {EXPORT: {"adapter": adapter}} if adapter else {}
        weights, training = weights_of(self._model), {}
        if self._resumable:
            whole = {
                "parts": {name: p.state_dict() for name, p in self._parts.items() if p is not None},
                "generators": [now for now, _ in rows],
                "epochs": [began for _, began in rows],
                "trainer": self._trainer_state(state),
                "commits": self._commits,
                "adapter": adapter,
            }
            training = to_tensors(whole, STATE)
        self._kept.save(
            weights,
            training,
            step=int(state.global_step),
            metrics=metrics,
            metadata={"epoch": state.epoch, **said},
            of_training={EXPORT: {**said.get(EXPORT, {}), "without": f"{STATE}."}},
        )

    def _trainer_state(self, state: TrainerState) -> dict[str, Any]:
        if self._trainer is not None:
            handler = self._trainer.callback_handler
            known: Any = state.stateful_callbacks
            for callback in [*handler.callbacks, self._trainer.control]:
                if isinstance(callback, ExportableState):
                    known[type(callback).__name__] = callback.state()
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(state)))
        return found

    def _take_up(self, point: Checkpoint, state: TrainerState) -> None:
        """Restore all that the Trainer has not restored itself."""
        resumed = self._state or {}
        self.restore(self._model, point)
        for name, part in resumed["parts"].items():
            if self._parts.get(name) is not None:
                self._parts[name].load_state_dict(part)
        self._commits = resumed["commits"]
        in_main_process(lambda: self._kept.rewind(self._commits))
        if self._is_over(state):
            self._point = point

    def _is_over(self, state: TrainerState) -> bool:
        return 0 < state.max_steps <= state.global_step

    def _undo(self, state: TrainerState, control: TrainerControl) -> None:
        """Take back the step that the Trainer does before it sees that there was none left."""
        point, resumed = self._point, self._state
        if point is None or resumed is None:
            return
        self._take_up(point, state)
        for name in ("global_step", "epoch", "num_input_tokens_seen", "total_flos"):
            setattr(state, name, resumed["trainer"][name])
        control.should_log = control.should_evaluate = control.should_save = False
        control.should_training_stop = True

    def _set_generators(self, args: TrainingArguments, when: str) -> None:
        rows = (self._state or {}).get(when, [])
        if args.process_index < len(rows) and rows[args.process_index] is not None:
            set_generators(rows[args.process_index])

    def _drop_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _store_at(path: PathLike) -> Store:
    try:
        return Store.create(path)
    except NotAStoreError:
        # It is there already, maybe since a moment ago by another process of this run.
        return Store.open(path)
