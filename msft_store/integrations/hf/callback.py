"""Keep the checkpoints of a Hugging Face Trainer or a trainer of TRL in a store.

The callback commits the weights, with the metrics of the evaluation and the model's configuration
and tokenizer, whenever the Trainer evaluates or would save. A retention policy decides which
checkpoints stay: a best one per dataset costs a few percent of a full checkpoint. The callback also
keeps one resume point, the latest, with optimizer, schedule, generators and the Trainer's own
state. No ``checkpoint-*`` directories are written.

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
import re
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
from msft_store.integrations.hf.peft import KeptModel, find_local_model
from msft_store.integrations.hf.resume_directory import write_resume_directory
from msft_store.integrations.hf.run_timelines import RunTimelines, SaveLimit
from msft_store.integrations.hf.trainer_checks import (
    check_trainer,
    extract_metrics,
    find_ignored_options,
    find_outside,
    find_trainer,
    find_unknown_metrics,
)
from msft_store.integrations.model_files import model_files
from msft_store.integrations.trained import outside_state, restore_outside
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
from msft_store.tensors.bytes import check_tensors
from msft_store.tensors.files import check_files
from msft_store.timeline.timeline import Timeline

STATE = "trainer"
"""First part of the names of a resume point's tensors that are not weights, unless weights have it
too.
"""


class StoreCallback(TrainerCallback):
    """A Trainer's callback that commits to a store, keeps the best checkpoints and resumes.

    Every further ``train()`` of the same Trainer that does not resume begins a run of its own:
    ``NAME-2``, ``NAME-3`` and so on. Each trial of ``hyperparameter_search`` is a run, too:
    ``NAME-run-0`` and so on. ``store``, ``base`` and ``name`` are attributes, too.

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
        self._background = background
        self._timelines = RunTimelines(self.store, name, background=background)
        self._first_name = name
        self._earlier: list[RunTimelines] = []
        """The timelines of earlier runs; every further training begins a run of its own."""
        self._attempt: tuple[int, Any] | None = None
        """The batch size and the trial of a training that has begun and not ended."""
        self._begun_from: Checkpoint | None = None
        """The resume point from which that training began."""
        self._has_trained = False
        self._keeps_state = resumable
        """True if this training keeps a resume point."""
        self._trainer: Any = None
        self._model: Any = None
        self._kept: KeptModel | None = None
        """The model of this training, as its checkpoints hold it."""
        self._outside: dict[str, torch.Tensor] = {}
        """The parameters that the optimizer trains and that are not the model's."""
        self._processor_files: dict[str, bytes] = {}
        """The files of the Trainer's tokenizer or processor, in the main process."""
        self._parts: dict[str, Any] = {}
        self._parts_checked = True
        self._wanted: dict[str, Mode] = {}
        """The metric of ``metric_for_best_model`` and its direction."""
        self._metrics: dict[str, float] = {}
        self._is_due = False
        self._is_save_due = False
        """True if the other callbacks are to be told of a save."""
        self._is_over = False
        """True if the last commit is made and the best checkpoint restored."""
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
        """Add this callback to a Trainer and return it; ``callbacks=[…]`` does the same."""
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
        self._state = state = self._load_state(point)
        training = names_of(self.store, point, prefix_of(point, STATE))
        names = self.store.tensors(point).keys() - set(training)
        weights = self.store.load(point, sorted(names))
        self._folder = write_resume_directory(
            output_dir, weights, state["trainer"], adapter=state["adapter"]
        )
        return str(self._folder)

    def best(self, metric: str, mode: Mode | None = None) -> Checkpoint:
        """Return the best kept checkpoint by a metric; the oldest one if several are equal.

        Args:
            metric: The metric's name, as ``"eval_loss"``. NaN and infinite values are ignored.
            mode: ``"min"`` or ``"max"``. The default is the direction in ``best`` or
                ``metric_for_best_model``, and ``"min"`` for a loss.

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

        Of a model with PEFT adapters, its active adapters are restored, and everything else that
        was trained.

        Raises:
            UnknownCheckpointError: If there is no such checkpoint.
            MismatchError: If a tensor or an active adapter is missing, or a tensor has another
                shape or dtype.
            CorruptedError: If a file of the store is damaged.
        """
        kept = self._kept
        if kept is None or kept.model is not model:
            kept = KeptModel(model)
        kept.restore(self.store, checkpoint)

    def close(self) -> None:
        """Stop protecting the checkpoints of this callback's runs, so that a gc with a policy may
        delete them.
        """
        for timelines in (*self._earlier, self._timelines):
            timelines.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the timelines, and restore the resume point if there is one."""
        self._trainer = find_trainer(self) or self._trainer
        point, self._point = self._point, None
        attempt = (getattr(self._trainer, "_train_batch_size", 0), state.trial_params)
        is_retry = point is None and _is_retry(args, self._attempt, attempt)
        if is_retry and self._begun_from is not None:
            point = self._begun_from
            self._state = self._load_state(point)
        # The Trainer reads the directory again if it begins again with a smaller batch.
        if not args.auto_find_batch_size:
            self._drop_folder()
        # These values may be left over from a failed training with this callback.
        self._metrics, self._epoch_began = {}, None
        self._is_due = self._is_save_due = self._is_over = False
        attached = self._trainer is not None
        self._keeps_state = self._resumable and not args.save_only_model
        model = kwargs["model"]
        check_trainer(args, state, model, attached=attached, resumable=self._keeps_state)
        if not self._has_trained:
            for line in find_ignored_options(args):
                warnings.warn(line, stacklevel=1)
        self._model = model
        # Refuse weights that cannot be saved now, and not at the first save.
        if self._kept is None or self._kept.model is not model:
            self._kept = KeptModel(model)
        self._kept.tensors()
        self._outside = find_outside(kwargs.get("optimizer"), model, resumable=self._keeps_state)
        self._parts_checked = not self._keeps_state
        self._parts = {"optimizer": kwargs.get("optimizer"), "schedule": kwargs.get("lr_scheduler")}
        if self._trainer is not None and getattr(self._trainer.accelerator, "scaler", None):
            self._parts["scaler"] = self._trainer.accelerator.scaler
        self._wanted = {}
        if args.metric_for_best_model:
            wanted = args.metric_for_best_model
            metric = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
            self._wanted = {metric: "max" if args.greater_is_better else "min"}
        if point is None and not is_retry:
            self._begin_run(run_in_main_process(lambda: self._choose_name(state)))
        is_used = run_in_main_process(lambda: self._open_run(args, kwargs.get("processing_class")))
        at = self._state["trainer"]["global_step"] if self._state is not None else None
        if point is not None and state.global_step == at:
            self._restore_state(point, state)
        elif is_retry:
            self._state, self._commits = None, 0
            run_in_main_process(lambda: self.timeline.rewind(0))
        elif self._commits or is_used:
            self._model, self._state = None, None
            advice = (
                "resume it with train(resume_from_checkpoint=callback.resume(output_dir)), or "
                if self._keeps_state and not state.is_hyper_param_search
                else ""
            )
            raise InvalidInputError(
                f"{self.store.path} has a run {self.name!r} already: {advice}give another name"
            )
        else:
            self._state = None
        self._begun_from = point if args.auto_find_batch_size else None
        run_in_main_process(lambda: self._timelines.hold(self._begun_from))
        self._attempt, self._has_trained = attempt, True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Commit what is due, and restore the random generators of a resumed epoch."""
        control = self._flush(args, state, control, kwargs)
        # A resume inside an epoch first draws the epoch's order, then continues with the step.
        middle = state.epoch is not None and not float(state.epoch).is_integer()
        self._set_generators(args, "epochs" if middle else "generators")
        self._epoch_began = generators()
        return control

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Commit what is due, and restore the random generators of a resumed step."""
        control = self._flush(args, state, control, kwargs)
        if self._state is not None and not self._is_complete(state):
            if not float(state.epoch or 0).is_integer():
                self._set_generators(args, "generators")
            self._state = None
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the save of the Trainer: mark a commit as due."""
        if self._state is not None:
            self._undo_step(state, control)
        if not self._parts_checked:
            # The optimizer has a state from the first step on.
            check_tensors(to_tensors([self._states(), outside_state(self._outside)], STATE))
            self._parts_checked = True
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
                stacklevel=1,
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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """End the training before any callback's ``on_train_end``: they see the best weights.

        The log of the whole training is the last event before those.
        """
        if self._model is not None and {"train_runtime", "total_flos"} <= (logs or {}).keys():
            self._end(args, state, control, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the training if its log did not yet."""
        if self._model is not None and not self._is_over:
            self._end(args, state, control, kwargs)
        run_in_main_process(lambda: self._timelines.hold(None))
        self._drop_folder()
        self._model, self._state, self._attempt, self._begun_from = None, None, None, None

    def _end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: dict[str, Any],
    ) -> None:
        """Commit what is due; with ``load_best_model_at_end``, restore the best checkpoint."""
        run_in_main_process(lambda: self._timelines.set_policy(self._policy(args, final=True)))
        self._flush(args, state, control, kwargs)
        run_in_main_process(self._timelines.wait)
        self._is_over = True
        if not args.load_best_model_at_end or not self._wanted:
            return
        best = run_in_main_process(self._find_wanted_best)
        if best is not None:
            self.restore(self._model, best)
        else:
            warnings.warn(
                f"no evaluation gave a finite {next(iter(self._wanted))!r}: the weights of "
                "the last step are kept",
                stacklevel=1,
            )

    def _choose_name(self, state: TrainerState) -> str:
        """Return the name of the run of a training that does not resume."""
        if state.is_hyper_param_search and self._trainer is not None:
            # The Trainer names the directory of a trial run-0, or as hp_name says.
            folder = Path(self._trainer._get_output_dir(self._trainer._trial)).name
            return f"{self._first_name}-{re.sub(r'[^A-Za-z0-9._-]', '-', folder)}"
        name, number = self._first_name, 1
        while self._has_trained and self._timelines_of(name).is_used():
            number += 1
            name = f"{self._first_name}-{number}"
        return name

    def _begin_run(self, name: str) -> None:
        if name != self.name:
            self._timelines.leave()
            self._earlier.append(self._timelines)
            self.name, self._commits = name, 0
            self._timelines = self._timelines_of(name)

    def _timelines_of(self, name: str) -> RunTimelines:
        return RunTimelines(self.store, name, background=self._background)

    def _load_state(self, point: Checkpoint) -> dict[str, Any]:
        prefix = prefix_of(point, STATE)
        training = names_of(self.store, point, prefix)
        state: dict[str, Any] = from_tensors(self.store.load(point, training), prefix)
        return state

    def _open_run(self, args: TrainingArguments, processing_class: Any) -> bool:
        """Collect the processor's files and open the timelines; return True if they were used."""
        if processing_class is None and self._trainer is not None:
            # The Trainer saves this one, too.
            processing_class = getattr(self._trainer.data_collator, "tokenizer", None)
        self._processor_files = check_files(model_files(None, processing_class))
        return self._timelines.open(
            self.base,
            self._policy(args),
            resumable=self._keeps_state,
            restart=self._resume_called,
        )

    def _policy(self, args: TrainingArguments, *, final: bool = False) -> Policy:
        """Return the run's policy; ``final`` for the last commit."""
        best = [KeepBest(metric, 1, mode=mode) for metric, mode in self._best.items()]
        wanted = next(iter(self._wanted.items()), None)
        policy: Policy = KeepLast(1)
        if args.save_total_limit is not None and args.save_total_limit > 0:
            policy = SaveLimit(args.save_total_limit, wanted, final)
        elif wanted is not None:
            best.append(KeepBest(wanted[0], 1, mode=wanted[1]))
        for part in (*best, *([] if self._retention is None else [self._retention])):
            policy = policy | part
        return policy

    def _find_wanted_best(self) -> str | None:
        try:
            return self.best(next(iter(self._wanted))).id
        except UnknownCheckpointError:
            return None

    def _take_over_save(self, control: TrainerControl) -> None:
        if control.should_save:
            control.should_save, self._is_due, self._is_save_due = False, True, True

    def _flush(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: dict[str, Any],
    ) -> TrainerControl:
        """Commit if an evaluation or a save happened since the last commit.

        After a save, tell the other callbacks of it, as the Trainer would.
        """
        if not self._is_due:
            return control
        if self._trainer is not None:
            self._trainer.store_flos()
        rng_states = gather_objects((generators(), self._epoch_began)) if self._keeps_state else []
        metrics, self._metrics, self._is_due = self._metrics, {}, False
        if metrics and not self._has_metrics:
            self._has_metrics = True
            for line in find_unknown_metrics([*self._best, *self._wanted], metrics):
                warnings.warn(line, stacklevel=1)
        self._commits += 1
        run_in_main_process(lambda: self._commit(state, metrics, rng_states))
        is_save, self._is_save_due = self._is_save_due, False
        if is_save and self._trainer is not None:
            for callback in self._trainer.callback_handler.callbacks:
                if callback is not self:
                    control = callback.on_save(args, state, control, **kwargs) or control
        return control

    def _commit(
        self, state: TrainerState, metrics: dict[str, float], rng_states: list[Any]
    ) -> None:
        kept = self._kept or KeptModel(self._model)
        settings = kept.export_settings()
        export = {EXPORT: settings} if settings else {}
        weights, training = kept.tensors(), {}
        prefix = free_prefix(STATE, weights)
        if self._keeps_state:
            snapshot = {
                "parts": self._states(),
                "generators": [now for now, _ in rng_states],
                "epochs": [began for _, began in rng_states],
                "trainer": self._trainer_state(state),
                "commits": self._commits,
                "adapter": settings.get("adapter"),
                "outside": outside_state(self._outside),
            }
            training = to_tensors(snapshot, prefix)
        self._timelines.commit(
            weights,
            training,
            step=int(state.global_step),
            metrics=metrics,
            metadata={"epoch": state.epoch, **export},
            resume_metadata={EXPORT: {**settings, "without": f"{prefix}."}},
            files={**model_files(self._model), **self._processor_files},
        )

    def _states(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items() if part is not None}

    def _trainer_state(self, state: TrainerState) -> dict[str, Any]:
        if self._trainer is not None:
            handler = self._trainer.callback_handler
            states: dict[str, list[Any]] = {}
            for callback in [*handler.callbacks, self._trainer.control]:
                if isinstance(callback, ExportableState):
                    states.setdefault(type(callback).__name__, []).append(callback.state())
            known: Any = state.stateful_callbacks
            known.update({name: s[0] if len(s) == 1 else s for name, s in states.items()})
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(state)))
        return found

    def _restore_state(self, point: Checkpoint, state: TrainerState) -> None:
        """Restore the state that the Trainer does not restore itself."""
        resumed = self._state or {}
        self.restore(self._model, point)
        restore_outside(self._outside, resumed.get("outside", {}))
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


def _is_retry(
    args: TrainingArguments, before: tuple[int, Any] | None, now: tuple[int, Any]
) -> bool:
    """Return True if ``auto_find_batch_size`` begins a training again with a smaller batch."""
    if not args.auto_find_batch_size or before is None:
        return False
    return now[0] < before[0] and now[1] == before[1]


def _store_at(path: PathLike) -> Store:
    try:
        return Store.create(path)
    except NotAStoreError:
        # It exists already. Another process of this run may have made it just now.
        return Store.open(path)
