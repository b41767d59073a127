"""The open directory of a Trainer's run: its journal, store, timeline and decisions.

Only the main process has a journal and a timeline; the others read restored weights from the store,
and encode their parts of a sharded model into it.
Records, policies and the result are those of ``msft-train``, so that its commands read the run.

Invariants: a decision is journaled before it is acted on. The weights that a run began from are
kept until it ends, because an adapter's cannot be made again.

Example::

    with open_session(config, base_path, metrics) as session:
        session.attach(trainer, mixture)
        session.restore_root()
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from msft_store import Base, Checkpoint, KeepBest, KeepThese, NotAStoreError, Store, Timeline
from msft_store.integrations.model_files import model_files
from trainer.algorithms import make_strategy
from trainer.algorithms.base import Decision, Divergence, RollBack, Stop
from trainer.algorithms.divergence import all_non_finite
from trainer.algorithms.overall import MixtureMetrics
from trainer.config.load import to_dict
from trainer.config.schema import OVERALL, Config
from trainer.data.schedule import Schedule
from trainer.distributed import share, this_process
from trainer.errors import RunError
from trainer.files import make_directory
from trainer.hf.metrics import Measured
from trainer.hf.mixture import Mixture
from trainer.hf.weights import RunWeights
from trainer.journal import Journal, JournalQueue, Record, effective, mode_of, read, run_started
from trainer.text import metric_title
from trainer.training.decisions import Decisions, Place
from trainer.training.directory import CONFIG, JOURNAL, STORE, hold_lock
from trainer.training.replay import KnownEvaluation, StageStart, replay, where_to_resume
from trainer.training.rollback_points import PendingSave

START, RESULT = "start", "result"
"""The refs of the weights that a run begins from, and of its result."""

_FIXED = ("method", "seed", "msft", "evaluation")
"""The settings of a run that a resume must not change."""

_log = logging.getLogger(__name__)


@contextmanager
def open_session(
    config: Config, base_path: Path | None, metrics: MixtureMetrics
) -> Iterator[RunSession]:
    """Open or begin the run of a configuration, and lock its directory; in all processes.

    Raises :class:`RunError` if the directory has a run with other settings.
    """
    process, directory = this_process(), Path(config.output_dir)
    is_main = process.is_main_process
    if is_main:
        make_directory(directory)
    process.wait_for_everyone()
    with ExitStack() as stack:
        if is_main:
            stack.enter_context(hold_lock(directory))
        journal = stack.enter_context(Journal(directory / JOURNAL)) if is_main else None
        store = _open_store(directory / STORE) if is_main else None
        process.wait_for_everyone()
        store = store or Store.open(directory / STORE)
        session = RunSession(config, metrics, journal, store)
        session.open_timeline(base_path)
        try:
            yield session
        finally:
            session.wait()


def _open_store(path: Path) -> Store:
    try:
        return Store.open(path)
    except NotAStoreError:
        return Store.create(path)


class RunSession:
    """A run that is open, in one process."""

    def __init__(
        self, config: Config, metrics: MixtureMetrics, journal: Journal | None, store: Store
    ) -> None:
        """Use :func:`open_session`."""
        self._config = config
        self._metrics = metrics
        self._journal = journal
        self._queue = JournalQueue(journal)
        self._store = store
        self._base: Base | None = None
        self._timeline: Timeline | None = None
        self._trainer: Any = None
        self._weights: RunWeights | None = None
        self._mixture: Mixture | None = None
        self._schedule: Schedule | None = None
        path = Path(config.output_dir) / JOURNAL
        counted = effective(read(path)) if path.exists() else []
        self._has_begun = bool(counted)
        self.is_finished = any(record["event"] == "finished" for record in counted)
        """True if the run has its result."""
        if counted:
            self._check_same(run_started(counted))
            after, origin = where_to_resume(counted, None)
            counted = [record for record in counted if record["seq"] <= after]
            if not self.is_finished:
                self._queue.add("resumed", after=after, **{"from": origin})
        sizes = dict.fromkeys(config.data.sub_datasets, 1.0)
        strategy = make_strategy(config, sizes, mode=metrics.mode, modes=metrics.other_modes)
        state = replay(counted, strategy)
        self._decisions = Decisions(strategy, self._queue, state)
        first = next(iter(state.known.values()), None)
        self._base_metrics = None if first is None else first.metrics
        self.stop = state.stop
        """The decision that ended training, if it has ended."""
        self.start = state.current
        """The start of the current stage."""
        self.global_step = state.global_step
        """Optimizer steps since the run began."""
        self._stage_step = state.global_step

    def open_timeline(self, base_path: Path | None) -> None:
        """Open the timeline of a run that is not finished, in the main process."""
        if self._journal is None or self.is_finished:
            return
        self._base = None if base_path is None else self._store.add_base(base_path)
        policy = KeepBest(OVERALL, mode=self._metrics.mode)
        name = self._config.method
        self._timeline = Timeline(self._store, self._base, retention=policy, name=name)

    def attach(self, trainer: Any, mixture: Mixture) -> None:
        """Take the Trainer of the current stage, and record a run that begins."""
        self._trainer, self._mixture = trainer, mixture
        self._weights = RunWeights(trainer, Path(self._config.output_dir) / STORE)
        if not self._has_begun:
            self._queue.add("run_started", **self._start_record(trainer.args))
            self._has_begun = True

    def restore_root(self) -> None:
        """Give the model the weights of the stage's root, and the timeline its branch."""
        root, timeline, weights = self.start.root, self._timeline, self._attached()
        if timeline is not None:
            timeline.retention = self._decisions.make_policy()
            if root is None:
                timeline.rewind(0)
            elif timeline.branch < self.start.stage.number - 1:
                self._roll_back(timeline, root, weights)
            else:
                timeline.rewind(1)
        if root is None:
            self._keep_start(weights)
        self._trainer.accelerator.wait_for_everyone()
        weights.restore(self._store, root or START)

    def begin_stage(self, schedule: Schedule) -> None:
        """Take the plan of a stage; it is recorded once the stage's root is durable."""
        self._stage_step, self._schedule = self.global_step, schedule
        if self.start.root is not None:
            self._record_stage(self.start.root)

    def record_steps(self, place: Place, totals: Mapping[str, Any]) -> None:
        """Record the steps since the last record."""
        self._queue.add("trained", step=place.step, stage=place.stage, epoch=place.epoch, **totals)

    def decide_root(self, place: Place) -> Decision | None:
        """Decide on the known evaluation of the stage's root; ``None`` but in the main process."""
        root = self.start.root
        if self._timeline is None or root is None:
            return None
        known = self._decisions.known[root]
        return self._decisions.decide(place, known, checkpoint=root, cost=None)

    def decide(self, place: Place, values: Measured, cost: Mapping[str, Any]) -> Decision | None:
        """Commit the weights with their metrics and decide; ``None`` but in the main process."""
        finding = share(all_non_finite(values.metrics))
        if finding is not None:
            return self._on_divergence(place, finding.value)
        began = time.monotonic()
        with self._attached().encode(self._timeline) as tensors:
            return self._commit(place, values, cost, tensors, began)

    def _commit(
        self, place: Place, values: Measured, cost: Mapping[str, Any], tensors: Any, began: float
    ) -> Decision | None:
        timeline, mixture = self._timeline, self._mixture
        if timeline is None or mixture is None:
            return None
        metrics = dict(values.metrics)
        sizes = mixture.validation_sizes
        metrics[OVERALL] = self._metrics.compute_overall(values.metrics, sizes, self._base_metrics)
        self._base_metrics = self._base_metrics or metrics
        self._queue.flush()
        timeline.retention = self._decisions.make_policy()
        metadata = {"stage": place.stage, "epoch": place.epoch}
        facts = (place.step, metrics, metadata, self._model_files())
        future = self._attached().commit(timeline, tensors, *facts)
        save = PendingSave(
            future=future,
            timeline=timeline,
            stage=place.stage,
            step=place.step,
            seconds=time.monotonic() - began,
        )
        if self.start.root is None and place.index == 0:
            self._record_stage(future.result().id)
        known = KnownEvaluation(
            metrics=metrics,
            losses=values.losses,
            stage=place.stage,
            step=place.step - self._stage_step,
        )
        return self._decisions.decide(place, known, checkpoint=save, cost=cost)

    def end_stage(self, decision: RollBack | Stop) -> None:
        """Go on to the next stage, or end the training."""
        if isinstance(decision, Stop):
            self.stop = decision
        else:
            self.start = StageStart(stage=decision.stage, root=decision.checkpoint)

    def finish(self, stop: Stop) -> Checkpoint:
        """Give the model the result's weights, keep nothing else in the store, and end the run."""
        timeline, weights = self._timeline, self._attached()
        if timeline is not None:
            self._store.pin(stop.checkpoint, RESULT)
            timeline.retention = KeepThese(frozenset({stop.checkpoint}))
            self._roll_back(timeline, stop.checkpoint, weights)
            self._drop_start()
            timeline.close()
        self._trainer.accelerator.wait_for_everyone()
        weights.restore(self._store, stop.checkpoint)
        if self._journal is not None and not self.is_finished:
            seconds = time.time() - read(self._journal.path)[0]["time"]
            self._queue.add("finished", checkpoint=stop.checkpoint, model_dir=None, seconds=seconds)
        return self._store.get(stop.checkpoint)

    def wait(self) -> None:
        """Wait for the pending commit and write the records behind it, also after an error."""
        try:
            self._queue.flush()
        finally:
            if self._timeline is not None and self.stop is None:
                self._timeline.wait()

    def _attached(self) -> RunWeights:
        if self._weights is None:
            raise RunError("a stage has no model before its Trainer is made")
        return self._weights

    def _model_files(self) -> dict[str, bytes]:
        trainer = self._trainer
        return model_files(trainer.model, getattr(trainer, "processing_class", None))

    def _roll_back(self, timeline: Timeline, checkpoint: str, weights: RunWeights) -> None:
        weights.roll_back(timeline, checkpoint)
        report = timeline.last_commit
        if report is not None:
            sizes = {"disk_peak_bytes": report.peak_bytes, "disk_bytes": report.bytes}
            self._queue.add("rolled_back", checkpoint=checkpoint, **sizes)

    def _keep_start(self, weights: RunWeights) -> None:
        """Save the weights that the run begins from, once; all processes must call this."""
        if share(START in self._store.refs()):
            return
        with weights.encode(self._timeline) as tensors:
            if self._timeline is not None:
                self._store.pin(self._store.save(tensors, parent=self._base), START)

    def _drop_start(self) -> None:
        if START in self._store.refs():
            start = self._store.get(START).id
            self._store.unpin(START)
            self._store.evict([start])

    def _on_divergence(self, place: Place, value: str) -> Decision | None:
        if self._timeline is None:
            return None
        what = f"{metric_title(self._metrics.name)} of every sub-dataset"
        if place.index == 0:
            raise RunError(f"the {what} is {value} before any training: is the model sound?")
        divergence = Divergence(
            stage=place.stage, epoch=place.epoch, step=place.step, what=what, value=value
        )
        return self._decisions.on_divergence(divergence, index=place.index - 1)

    def _record_stage(self, root: str) -> None:
        stage, schedule, mixture = self.start.stage, self._schedule, self._mixture
        if schedule is None or mixture is None:
            raise RunError("a stage is recorded after its Trainer has planned it")
        self._queue.add(
            "stage_started",
            step=self._stage_step,
            stage=stage.number,
            root=root,
            active=list(stage.active),
            shares=dict(stage.shares),
            limits=dict(stage.limits),
            floor=stage.floor,
            epochs=stage.epochs,
            steps=schedule.steps,
            examples=sum(mixture.train_sizes[name] for name in stage.active),
        )
        _log.info("stage %d trains %s", stage.number, ", ".join(stage.trained))

    def _check_same(self, started: Record) -> None:
        """Raise :class:`RunError` if a run has other settings than this one."""
        directory = Path(self._config.output_dir)
        if (directory / CONFIG).exists():
            raise RunError(
                f"the run in {directory} was begun by msft-train: continue it with `msft-train "
                f"resume {directory}`, or choose another output_dir"
            )
        before, now = started["config"], to_dict(self._config)
        pairs = [(key, before.get(key), now.get(key)) for key in _FIXED]
        pairs.append(("metric", started["metrics"], dict(self._metrics.names)))
        modes = {name: mode_of(started, name) for name in started["sub_datasets"]}
        pairs.append(("mode", modes, dict(self._metrics.modes)))
        pairs.append(("overall", started["overall"], self._metrics.overall))
        pairs.append(
            ("mixture", sorted(started["sub_datasets"]), sorted(now["data"]["sub_datasets"]))
        )
        for key, old, new in pairs:
            if old != new:
                raise RunError(
                    f"the run in {self._config.output_dir} was begun with {key} {old!r}, and now "
                    f"it is {new!r}: give what it was begun with, or choose another output_dir"
                )

    def _start_record(self, args: TrainingArguments) -> Record:
        """Return the fields of the ``run_started`` record."""
        model, mixture = self._trainer.model, self._mixture
        if mixture is None:
            raise RunError("a run has a mixture")
        config = to_dict(self._config)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        config["train"] |= {"lr": args.learning_rate, "batch_size": batch * args.world_size}
        parameters = list(model.parameters())
        files = [] if self._base is None else [path for path, _ in self._base.files]
        return {
            "version": version("msft-store"),
            "method": self._config.method,
            "config": config,
            "model": {
                "path": self._config.model.path,
                "parameters": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
                "dtype": str(parameters[0].dtype).removeprefix("torch."),
                **_width(model),
            },
            "mode": self._metrics.mode,
            "modes": self._metrics.other_modes,
            "metric": self._metrics.name,
            "metrics": dict(self._metrics.names),
            "overall": self._metrics.overall,
            "sub_datasets": {
                name: {
                    "train": mixture.train_sizes[name],
                    "validation": mixture.validation_sizes[name],
                    "test": 0,
                    "too_long": 0,
                    "set_aside": 0,
                }
                for name in mixture.training_sets
            },
            "steps_per_epoch": None,
            "full_checkpoint_bytes": self._attached().full_bytes,
            "base_bytes": sum(os.path.getsize(path) for path in files),
            "base_id": None if self._base is None else self._base.id,
        }


def _width(model: Any) -> dict[str, int]:
    """Return layers and width of a model, 0 if its configuration has none."""
    config = getattr(model, "config", None)
    text: Any = config
    if config is not None and hasattr(config, "get_text_config"):
        text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None) or getattr(text, "num_layers", None)
    return {"layers": int(layers or 0), "hidden": int(getattr(text, "hidden_size", None) or 0)}
