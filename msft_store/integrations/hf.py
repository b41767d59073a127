"""The store in the place of ``checkpoint-*`` directories: for the Trainer and TRL's trainers.

The callback commits the weights whenever the Trainer would save or evaluates, with the metrics of
that evaluation, and a retention policy decides what stays: a best per dataset costs a few percent
of a checkpoint, not a whole one. Beside them it keeps one resume point: optimizer, schedule,
generators and the Trainer's own state, only the latest. No ``checkpoint-*`` directory is written.

A dictionary of evaluation sets is evaluated one by one; all that the callback gets of them goes
into one commit, under the names that the Trainer gives: ``eval_NAME_loss``.

Invariants: a commit and its resume point are of the same step; resuming goes on as if nothing had
happened, bit for bit where training itself is repeatable; nothing is pickled.

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
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from msft_store.bases import Base
from msft_store.boxes import whole_box
from msft_store.errors import InvalidInputError, UnknownCheckpointError
from msft_store.integrations.training_state import (
    from_tensors,
    generators_of_all,
    names_of,
    set_generators,
    to_tensors,
)
from msft_store.manifest import Checkpoint
from msft_store.paths import PathLike
from msft_store.retention import KeepBest, KeepLast, Mode, Policy
from msft_store.store import Store
from msft_store.timeline import Timeline

STATE = "trainer"
"""What the names of a resume point's further tensors begin with."""
_RESUME = "-resume"
_STATE_FILE = "trainer_state.json"
_CLOCKS = ("_runtime", "_per_second", "_time", "epoch")
"""What an evaluation says besides its metrics; with it no two checkpoints would be equal."""


class StoreCallback(TrainerCallback):
    """Commits to a store, applies a retention policy, restores the best, resumes.

    ``store`` is one, or its directory, which is made if it is not there. ``base`` is the model that
    training starts from: a directory, a safetensors file, or a :class:`Base`; for an adapter leave
    it out. ``best`` names metrics and their directions: the best checkpoint of each stays.
    ``retention`` is any further policy. ``name`` tells several runs in one store apart. Without
    ``resumable`` there is no resume point, only weights. Where the Trainer's other callbacks have
    state, or a gradient scaler does, :meth:`attach` instead of ``callbacks=[…]``.
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
    ) -> None:
        self.store = store if isinstance(store, Store) else _store_at(store)
        given = base is None or isinstance(base, Base)
        self.base: Base | None = base if given else self.store.add_base(base)  # type: ignore[assignment,arg-type]
        self.name = name
        self._best = dict(best or {})
        self._retention = retention
        self._resumable = resumable
        self._trainer: Any = None
        self._weights: Timeline | None = None
        self._resume: Timeline | None = None
        self._model: Any = None
        self._parts: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._due = False
        self._commits = 0
        self._state: dict[str, Any] | None = None
        """What is to be resumed."""
        self._generators: Mapping[str, Any] | None = None
        self._point: Checkpoint | None = None
        """What it is in."""
        self._folder: Path | None = None

    def attach(self, trainer: Any) -> StoreCallback:
        """Add this callback to a Trainer, and keep the state of its others; return it."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    @property
    def timeline(self) -> Timeline:
        """The commits of the run, once training has begun."""
        if self._weights is None:
            raise InvalidInputError("there is no timeline before training has begun")
        return self._weights

    def resume(self, output_dir: PathLike) -> str | None:
        """Return what ``train(resume_from_checkpoint=…)`` takes up; ``None`` if there is nothing.

        That is a directory in ``output_dir`` for the moment in which the Trainer reads it: the
        weights of the resume point, as plain safetensors, and the Trainer's state. In a group of
        processes each has one of its own.
        """
        self._drop_folder()
        point = self._resume_point()
        if point is None:
            return None
        tensors = self.store.load(point, names_of(self.store, point, STATE))
        self._state = from_tensors(tensors, STATE)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".resume-", dir=output_dir))
        adapter = self._state["adapter"]
        file = "adapter_model.safetensors" if adapter else "model.safetensors"
        save_file(self.store.load(point, self._weight_names(point)), self._folder / file)
        if adapter:
            (self._folder / "adapter_config.json").write_text(json.dumps(adapter))
        state = json.dumps(self._state["trainer"])
        (self._folder / _STATE_FILE).write_text(state, encoding="utf-8")
        self._point = point
        return str(self._folder)

    def best(self, metric: str, mode: Mode | None = None) -> Checkpoint:
        """Return the best of what is kept by a metric; :class:`UnknownCheckpointError` if none."""
        mode = mode or self._best.get(metric) or "min"
        able = [
            checkpoint
            for checkpoint in self.timeline.checkpoints()
            if math.isfinite(checkpoint.metrics.get(metric, math.nan))
        ]
        if not able:
            raise UnknownCheckpointError(f"no checkpoint that is kept has the metric {metric!r}")
        sign = 1.0 if mode == "min" else -1.0
        return min(able, key=lambda checkpoint: sign * checkpoint.metrics[metric])

    def restore(self, model: torch.nn.Module, checkpoint: Checkpoint | str) -> None:
        """Give a model the weights of a checkpoint, in place and bit-exact."""
        boxes = [whole_box(name, tensor) for name, tensor in weights_of(model).items()]
        self.store.load_boxes(checkpoint, boxes)

    def close(self) -> None:
        """Protect the run's checkpoints no longer: a gc with a policy may take them."""
        for timeline in (self._weights, self._resume):
            if timeline is not None:
                timeline.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the timelines, and what is to be resumed."""
        self._check(args, kwargs["model"])
        self._model = kwargs["model"]
        self._parts = {"optimizer": kwargs.get("optimizer"), "schedule": kwargs.get("lr_scheduler")}
        if self._trainer is not None and getattr(self._trainer.accelerator, "scaler", None):
            self._parts["scaler"] = self._trainer.accelerator.scaler
        if state.is_world_process_zero:
            self._begin(args)
        resumed, self._state = self._state, None
        self._drop_folder()
        if resumed is not None and state.global_step == resumed["trainer"]["global_step"]:
            self._take_up(resumed, args.process_index)
        elif self._commits or (self._weights is not None and self._weights.checkpoints()):
            raise InvalidInputError(
                f"{self.store.path} has a run {self.name!r} already: resume it with "
                "train(resume_from_checkpoint=callback.resume(output_dir)), or give another name"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what the step before has left, and go on with its random numbers."""
        self._flush(state)
        self._restore_generators()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what the epoch before has left, and go on with its random numbers."""
        self._flush(state)
        # In the middle of an epoch they are those of after the batches that are skipped.
        if state.epoch is None or float(state.epoch).is_integer():
            self._restore_generators()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save in the place of the Trainer."""
        self._take_over(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save in the place of the Trainer."""
        self._flush(state)
        self._take_over(control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the metrics for the commit; each of several datasets comes here by itself."""
        if self._model is None:
            return
        for name, value in (metrics or {}).items():
            if isinstance(value, (int, float)) and not name.endswith(_CLOCKS):
                self._metrics[name] = float(value)
        self._due = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what is left; with ``load_best_model_at_end``, restore the best."""
        self._flush(state)
        if args.load_best_model_at_end and args.metric_for_best_model:
            wanted = args.metric_for_best_model
            metric = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
            found: list[str | None] = [None]
            if state.is_world_process_zero:
                found = [self.best(metric, "max" if args.greater_is_better else "min").id]
            if args.world_size > 1:
                torch.distributed.broadcast_object_list(found)
            self.restore(self._model, str(found[0]))
        self._model = None

    def _check(self, args: TrainingArguments, model: torch.nn.Module) -> None:
        if args.save_strategy == "best":
            raise InvalidInputError(
                'save_strategy="best" decides when the callback has no say any more: use "steps" '
                'or "epoch", and best={metric: direction} of StoreCallback'
            )
        if args.fp16 and self._trainer is None:
            raise InvalidInputError("fp16 has a gradient scaler: use callback.attach(trainer)")
        if any(hasattr(tensor, "placements") for tensor in model.state_dict().values()):
            raise InvalidInputError(
                "the model is sharded (FSDP2): use msft_store.integrations.dcp, in which every "
                "process saves what it holds"
            )

    def _begin(self, args: TrainingArguments) -> None:
        policies: list[Policy] = [KeepBest(m, 1, mode=mode) for m, mode in self._best.items()]
        if args.load_best_model_at_end and args.metric_for_best_model:
            wanted = args.metric_for_best_model
            metric = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
            policies.append(KeepBest(metric, 1, mode="max" if args.greater_is_better else "min"))
        if self._retention is not None:
            policies.append(self._retention)
        policy: Policy = KeepLast(1)
        for each in policies:
            policy = policy | each
        self._weights = Timeline(self.store, self.base, retention=policy, name=self.name)
        if self._resumable:
            name = f"{self.name}{_RESUME}"
            self._resume = Timeline(self.store, self.base, retention=KeepLast(1), name=name)

    def _take_over(self, control: TrainerControl) -> None:
        if control.should_save:
            control.should_save, self._due = False, True

    def _flush(self, state: TrainerState) -> None:
        """Commit, if an evaluation or a save was due since the last commit."""
        if not self._due:
            return
        rows = generators_of_all() if self._resumable else []
        metrics, self._metrics, self._due = self._metrics, {}, False
        self._commits += 1
        if self._weights is None:
            return
        weights = weights_of(self._model)
        step = int(state.global_step)
        self._weights.commit(weights, step, metrics, {"epoch": state.epoch})
        if self._resume is not None:
            whole = {
                "parts": {name: p.state_dict() for name, p in self._parts.items() if p is not None},
                "generators": rows,
                "trainer": self._trainer_state(state),
                "commits": self._commits,
                "adapter": _adapter_of(self._model),
            }
            self._resume.commit({**weights, **to_tensors(whole, STATE)}, step, metrics)

    def _trainer_state(self, state: TrainerState) -> dict[str, Any]:
        if self._trainer is not None:
            handler = self._trainer.callback_handler
            known: Any = state.stateful_callbacks
            for callback in [*handler.callbacks, self._trainer.control]:
                if isinstance(callback, ExportableState):
                    known[type(callback).__name__] = callback.state()
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(state)))
        return found

    def _take_up(self, resumed: dict[str, Any], rank: int) -> None:
        """Restore all that the Trainer has not restored itself."""
        if self._point is not None:
            self.restore(self._model, self._point)
        for name, state in resumed["parts"].items():
            if self._parts.get(name) is not None:
                self._parts[name].load_state_dict(state)
        rows = resumed["generators"]
        self._generators = rows[rank] if rank < len(rows) else None
        self._commits = resumed["commits"]
        if self._weights is not None:
            self._weights.rewind(self._commits)

    def _restore_generators(self) -> None:
        if self._generators is not None:
            set_generators(self._generators)
            self._generators = None

    def _resume_point(self) -> Checkpoint | None:
        prefix = f"timelines/{self.name}{_RESUME}/"
        named = {target for ref, target in self.store.refs().items() if ref.startswith(prefix)}
        points = [checkpoint for checkpoint in self.store.log() if checkpoint.id in named]
        return points[-1] if points else None

    def _weight_names(self, point: Checkpoint) -> list[str]:
        return [n for n in self.store.tensors(point) if not n.startswith(f"{STATE}.")]

    def _drop_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that training changes; they share their memory with the model.

    Of a model with an adapter of PEFT that is the adapter, under the names of its files; of any
    other the whole state dict.
    """
    if hasattr(model, "peft_config"):
        # PEFT is optional, and there whenever a model has an adapter.
        from peft import get_peft_model_state_dict  # noqa: PLC0415

        found: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
        return found
    return dict(model.state_dict())


def _adapter_of(model: Any) -> dict[str, Any] | None:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = next(iter(configs.values())).to_dict()
    return {
        key: sorted(v) if isinstance(v, set) else v for key, v in config.items() if _is_plain(v)
    }


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(sorted(value) if isinstance(value, set) else value)
    except TypeError:
        return False
    return True


def _store_at(path: PathLike) -> Store:
    folder = Path(path)
    if not folder.exists() or not any(folder.iterdir()):
        return Store.create(folder)
    return Store.open(folder)
