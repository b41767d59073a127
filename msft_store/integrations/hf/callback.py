"""Keep the checkpoints of a Hugging Face Trainer or a trainer of TRL in a store.

The callback commits the weights, with the metrics of the evaluation, whenever the Trainer evaluates
or would save. A retention policy decides which checkpoints stay: a best one per dataset costs a few
percent of a full checkpoint. The callback also keeps one resume point, the latest, with optimizer,
schedule, generators and the Trainer's own state. No ``checkpoint-*`` directories are written.

The Trainer evaluates a dictionary of evaluation sets one by one. The callback makes one commit of
all of them, under the Trainer's names: ``eval_NAME_loss``. A metric that a trainer gives the same
name for all sets (``eval_entropy`` of TRL) is also kept as ``eval_NAME_entropy``.

Invariants:

- There is one commit per step, made when all evaluations of that step are done.
- The resume point belongs to the newest commit or the one before, and is never ahead of them.
- An error of one process is raised in all processes.
- A resumed run continues bit for bit as if it had not been interrupted, if training itself is
deterministic.
- Nothing is pickled.

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
from msft_store.integrations.hf.peft import (
    adapter_config,
    find_local_model,
    restore_weights,
    select_weights,
)
from msft_store.integrations.hf.resume_directory import write_resume_directory
from msft_store.integrations.hf.run_timelines import RunTimelines
from msft_store.integrations.hf.trainer_checks import (
    check_trainer,
    extract_metrics,
    find_unknown_metrics,
)
from msft_store.integrations.training_state import (
    free_prefix,
    from_tensors,
    gather_objects,
    generators,
    names_of,
    prefix_of,
    run_in_main_process,
    set_generators,
    to_tensors,
)
from msft_store.maintenance.export_names import KEY as EXPORT
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.retention import KeepBest, KeepLast, Mode, Policy, default_mode
from msft_store.store import Store
from msft_store.tensors.names import plain_names
from msft_store.timeline.timeline import Timeline

STATE = "trainer"
"""First part of the names of a resume point's tensors that are not weights, unless weights have it
too.
"""


class StoreCallback(TrainerCallback):
    """A Trainer's callback that commits to a store, keeps the best checkpoints and resumes.

    If other callbacks of the Trainer have a state, or training uses a gradient scaler, use
    :meth:`attach` instead of ``callbacks=[…]``.

    Args:
        store: A store or its directory, which is made if it does not exist.
        base: The model that training starts from: a directory, a safetensors file, the hub's id
            of a model in the cache, or a :class:`Base`. Leave it out for an adapter.
        best: Metrics and their directions, ``"min"`` or ``"max"``. The best checkpoint of each
            metric is kept.
        retention: A policy that keeps further checkpoints.
        name: The run's name, which must be unique in the store.
        resumable: True to keep a resume point; without it, only weights are kept.
        background: True to commit in the background. Training then waits only for a copy of the
            tensors in host memory.

    Attributes:
        store: The store.
        base: The base, or ``None``.
        name: The run's name.

    Raises:
        BaseError: If the base is not a model on this machine.
        InvalidInputError: If the name is reserved.
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
        is_base = base is None or isinstance(base, Base)
        self.base: Base | None = base if is_base else self.store.add_base(find_local_model(base))  # type: ignore[assignment,arg-type]
        self.name = name
        self._best = dict(best or {})
        self._retention = retention
        self._resumable = resumable
        self._timelines = RunTimelines(self.store, name, resumable=resumable, background=background)
        self._trainer: Any = None
        self._model: Any = None
        self._parts: dict[str, Any] = {}
        self._wanted: dict[str, Mode] = {}
        """The metric of ``metric_for_best_model`` and its direction."""
        self._metrics: dict[str, float] = {}
        self._is_due = False
        self._has_metrics = False
        """True after the first commit with metrics; unknown metric names are reported then."""
        self._commits = 0
        self._point: Checkpoint | None = None
        """The resume point, until the Trainer has restored it."""
        self._state: dict[str, Any] | None = None
        """The state of the resume point besides the weights, until the first step begins."""
        self._epoch_began: dict[str, Any] | None = None
        """The generators at the beginning of the epoch. Some samplers draw the epoch's order from
        them.
        """
        self._folder: Path | None = None
        self._resume_called = False
        """True if :meth:`resume` was called."""

    def attach(self, trainer: Any) -> StoreCallback:
        """Add this callback to a Trainer, and also keep the state of its other callbacks.

        Args:
            trainer: A ``transformers.Trainer``.

        Returns:
            This callback.
        """
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @property
    def timeline(self) -> Timeline:
        """The timeline of the run's weights.

        Raises:
            InvalidInputError: Before training begins, and in processes other than the main one.
        """
        return self._timelines.timeline

    def resume(self, output_dir: PathLike) -> str | None:
        """Prepare the argument of ``trainer.train(resume_from_checkpoint=…)``.

        Args:
            output_dir: The directory in which a temporary directory is written, one for each
                process. It holds the resume point's weights as safetensors and the Trainer's state,
                and is deleted when training begins.

        Returns:
            The path of that directory, or ``None`` if there is no resume point.

        Raises:
            CorruptedError: If the resume point is damaged.
        """
        self._drop_folder()
        self._resume_called = True
        self._point = point = self._timelines.find_resume_point()
        if point is None:
            return None
        prefix = prefix_of(point, STATE)
        training = names_of(self.store, point, prefix)
        self._state = state = from_tensors(self.store.load(point, training), prefix)
        names = self.store.tensors(point).keys() - set(training)
        weights = self.store.load(point, sorted(names))
        self._folder = write_resume_directory(
            output_dir, weights, state["trainer"], adapter=state["adapter"]
        )
        return str(self._folder)

    def best(self, metric: str, mode: Mode | None = None) -> Checkpoint:
        """Find the best kept checkpoint by a metric. NaN and infinite values are ignored.

        Args:
            metric: The metric's name, as ``"eval_loss"``.
            mode: ``"min"`` or ``"max"``. The default is the direction in ``best`` or
                ``metric_for_best_model``, and ``"min"`` for a loss.

        Returns:
            The checkpoint; the oldest one if several are equal.

        Raises:
            UnknownCheckpointError: If no kept checkpoint has the metric.
            InvalidInputError: If the direction is unknown.
        """
        candidates = [
            checkpoint
            for checkpoint in self._timelines.list_kept()
            if math.isfinite(checkpoint.metrics.get(metric, math.nan))
        ]
        if not candidates:
            raise UnknownCheckpointError(f"no checkpoint that is kept has the metric {metric!r}")
        known = {**self._wanted, **self._best}.get(metric)
        mode = mode or known or ("min" if default_mode(metric) == "min" else None)
        if mode is None:
            raise InvalidInputError(
                f"the direction of {metric!r} is unknown: call best({metric!r}, 'max') or 'min'"
            )
        sign = 1.0 if mode == "min" else -1.0
        return min(candidates, key=lambda checkpoint: sign * checkpoint.metrics[metric])

    def restore(self, model: torch.nn.Module, checkpoint: Checkpoint | str) -> None:
        """Restore a model's weights from a checkpoint, in place and bit for bit.

        Args:
            model: The model; with a PEFT adapter, its active adapter is restored.
            checkpoint: A checkpoint, its id or a ref.

        Raises:
            UnknownCheckpointError: If there is no such checkpoint.
            MismatchError: If a tensor is missing or has another shape or dtype.
            CorruptedError: If a file of the store is damaged.
        """
        restore_weights(model, self.store, checkpoint)

    def close(self) -> None:
        """Stop protecting the run's checkpoints, so that a gc with a policy may delete them."""
        self._timelines.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the timelines, and restore the resume point if there is one."""
        self._drop_folder()
        point, self._point = self._point, None
        # These values may be left over from a failed training with this callback.
        self._metrics, self._is_due, self._epoch_began = {}, False, None
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
        is_used = run_in_main_process(self._open_timelines)
        at = self._state["trainer"]["global_step"] if self._state is not None else None
        if point is not None and state.global_step == at:
            self._restore_state(point, state)
        elif self._commits or is_used:
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
        """Commit what is due, and restore the random generators of a resumed epoch."""
        self._flush(state)
        # A resume inside an epoch first draws the epoch's order, then continues with the step.
        middle = state.epoch is not None and not float(state.epoch).is_integer()
        self._set_generators(args, "epochs" if middle else "generators")
        self._epoch_began = generators()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what is due, and restore the random generators of a resumed step."""
        self._flush(state)
        if self._state is not None and not self._is_complete(state):
            if not float(state.epoch or 0).is_integer():
                self._set_generators(args, "generators")
            self._state = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the save of the Trainer: mark a commit as due."""
        if self._state is not None:
            self._undo_step(state, control)
        self._take_over_save(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the save of the Trainer: mark a commit as due."""
        self._take_over_save(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit, and warn that the Trainer wrote its own checkpoint."""
        if self._model is not None:
            self._is_due = True
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
        """Collect the metrics for the commit; each evaluation set calls this separately."""
        # An evaluation before the first step after a resume repeats that of the resume point.
        if self._model is None or self._state is not None:
            return
        self._metrics |= extract_metrics(metrics or {}, {*self._best, *self._wanted})
        self._is_due = True
        self._take_over_save(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what is due; with ``load_best_model_at_end``, restore the best checkpoint."""
        self._flush(state)
        run_in_main_process(self._timelines.wait)
        if self._wanted:
            best = run_in_main_process(self._find_wanted_best)
            if best is not None:
                self.restore(self._model, best)
            else:
                warnings.warn(
                    f"no evaluation gave a finite {next(iter(self._wanted))!r}: the weights of "
                    "the last step are kept",
                    stacklevel=2,
                )
        self._model, self._state = None, None

    def _open_timelines(self) -> bool:
        """Open the timelines with the run's policy; return True if they hold checkpoints."""
        directions = [*self._best.items(), *self._wanted.items()]
        policy: Policy = KeepLast(1)
        for metric, mode in directions:
            policy = policy | KeepBest(metric, 1, mode=mode)
        if self._retention is not None:
            policy = policy | self._retention
        return self._timelines.open(self.base, policy, restart=self._resume_called)

    def _find_wanted_best(self) -> str | None:
        try:
            return self.best(next(iter(self._wanted))).id
        except UnknownCheckpointError:
            return None

    def _take_over_save(self, control: TrainerControl) -> None:
        if control.should_save:
            control.should_save, self._is_due = False, True

    def _flush(self, state: TrainerState) -> None:
        """Commit if an evaluation or a save happened since the last commit."""
        if not self._is_due:
            return
        if self._trainer is not None:
            self._trainer.store_flos()
        rng_states = gather_objects((generators(), self._epoch_began)) if self._resumable else []
        metrics, self._metrics, self._is_due = self._metrics, {}, False
        if metrics and not self._has_metrics:
            self._has_metrics = True
            for line in find_unknown_metrics([*self._best, *self._wanted], metrics):
                warnings.warn(line, stacklevel=2)
        self._commits += 1
        run_in_main_process(lambda: self._commit(state, metrics, rng_states))

    def _commit(
        self, state: TrainerState, metrics: dict[str, float], rng_states: list[Any]
    ) -> None:
        adapter = adapter_config(self._model)
        export = {EXPORT: {"adapter": adapter}} if adapter else {}
        weights, training = plain_names(select_weights(self._model)), {}
        prefix = free_prefix(STATE, weights)
        if self._resumable:
            snapshot = {
                "parts": {name: p.state_dict() for name, p in self._parts.items() if p is not None},
                "generators": [now for now, _ in rng_states],
                "epochs": [began for _, began in rng_states],
                "trainer": self._trainer_state(state),
                "commits": self._commits,
                "adapter": adapter,
            }
            training = to_tensors(snapshot, prefix)
        self._timelines.commit(
            weights,
            training,
            step=int(state.global_step),
            metrics=metrics,
            metadata={"epoch": state.epoch, **export},
            resume_metadata={EXPORT: {**export.get(EXPORT, {}), "without": f"{prefix}."}},
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

    def _restore_state(self, point: Checkpoint, state: TrainerState) -> None:
        """Restore the state that the Trainer does not restore itself."""
        resumed = self._state or {}
        self.restore(self._model, point)
        for name, part in resumed["parts"].items():
            if self._parts.get(name) is not None:
                self._parts[name].load_state_dict(part)
        self._commits = resumed["commits"]
        run_in_main_process(lambda: self.timeline.rewind(self._commits))
        if self._is_complete(state):
            self._point = point

    def _is_complete(self, state: TrainerState) -> bool:
        return 0 < state.max_steps <= state.global_step

    def _undo_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Undo the one step that the Trainer takes before it sees that training was complete."""
        point, resumed = self._point, self._state
        if point is None or resumed is None:
            return
        self._restore_state(point, state)
        for name in ("global_step", "epoch", "num_input_tokens_seen", "total_flos"):
            setattr(state, name, resumed["trainer"][name])
        control.should_log = control.should_evaluate = control.should_save = False
        control.should_training_stop = True

    def _set_generators(self, args: TrainingArguments, when: str) -> None:
        rng_states = (self._state or {}).get(when, [])
        if args.process_index < len(rng_states) and rng_states[args.process_index] is not None:
            set_generators(rng_states[args.process_index])

    def _drop_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _store_at(path: PathLike) -> Store:
    try:
        return Store.create(path)
    except NotAStoreError:
        # It exists already. Another process of this run may have made it just now.
        return Store.open(path)
