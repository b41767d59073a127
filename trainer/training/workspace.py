"""Open a run: its directory, model, data, journal and store, as one ``Workspace``.

Every process of a run has the model and the data. Only the main process writes. The other processes
have no journal and no timeline; they receive decisions and restored weights from the main process.

Example::

    create_directory(config)
    with open_workspace(config) as work:
        ...
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from msft_store import (
    Base,
    DiskBudget,
    KeepBest,
    NotAStoreError,
    Policy,
    Resident,
    Store,
    Timeline,
)
from msft_store.integrations.model_files import model_files
from trainer.config.checks import to_bytes
from trainer.config.load import to_dict
from trainer.config.schema import OVERALL, Config
from trainer.data.examples import Example, Mixture
from trainer.data.load import load_mixture
from trainer.data.schedule import shares, stage_schedule
from trainer.errors import RunError
from trainer.journal import Journal, JournalQueue, Record, read
from trainer.model.forward import compute_in
from trainer.model.load import LoadedModel
from trainer.model.lora import adapter_files, load_for_training
from trainer.model.metrics import RunMetrics, load_metrics
from trainer.model.optim import make_optimizer
from trainer.model.sharding import Shards, prepare_sharding, shard_model
from trainer.model.weights import Snapshots
from trainer.training.directory import JOURNAL, STORE, hold_lock
from trainer.training.preflight import check_compatibility
from trainer.training.trackers import Trackers

RESULT = "result"
"""The ref that points to a finished run's result."""


@dataclass(kw_only=True)
class Workspace:
    """An open run directory and everything that training needs."""

    config: Config
    directory: Path
    accelerator: Accelerator
    loaded: LoadedModel
    model: Any
    """The model as Accelerate prepared it."""
    snapshots: Snapshots
    """The model's weights in the form that checkpoints hold."""
    optimizer: Any
    mixture: Mixture
    metrics: RunMetrics
    shards: Shards | None
    """The parts of the model that processes hold; ``None`` if each process has the whole model."""
    journal: Journal | None = None
    """``None`` in all but the main process, like ``store``, ``base`` and ``timeline``."""
    journal_queue: JournalQueue = field(default_factory=lambda: JournalQueue(None))
    store: Store | None = None
    base: Base | None = None
    timeline: Timeline | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Configuration and tokenizer, which checkpoints keep; empty in all but the main process."""

    def record(self, event: str, **fields: Any) -> None:
        """Add a record to the journal, in the main process, behind those that wait for a commit."""
        self.journal_queue.add(event, **fields)

    @property
    def max_disk(self) -> int | None:
        """The limit of the store in bytes; ``None``: no limit."""
        size = self.config.max_disk
        return None if size is None else to_bytes(size, self.loaded.full_bytes)

    @property
    def train_sizes(self) -> dict[str, int]:
        """The number of training examples by sub-dataset."""
        return {name: len(sub.train.examples) for name, sub in self.mixture.items()}

    @property
    def proportions(self) -> dict[str, float]:
        """The examples of each sub-dataset in an epoch, in the order of the configuration."""
        data, sizes = self.config.data, self.train_sizes
        sampled = shares(sizes, data.sampling, data.temperature)
        order = [*self.config.data.sub_datasets, *sizes]
        return {name: sizes[name] * sampled[name] for name in order if name in sizes}

    def split(self, name: str) -> dict[str, Sequence[Example]]:
        """Return the examples of ``train``, ``validation`` or ``test`` by sub-dataset."""
        splits = {key: getattr(sub, name) for key, sub in self.mixture.items()}
        return {key: split.examples for key, split in splits.items() if split is not None}

    def limit_policy(self, policy: Policy) -> Policy:
        """Return a retention policy that also stays within ``max_disk``."""
        return policy if self.max_disk is None else policy | DiskBudget(self.max_disk)

    def make_resident(self) -> Resident | None:
        """Return a copy of the current weights as the timeline's reference, if configured."""
        return Resident(self.snapshots.take()) if self.config.resident_reference else None


@contextmanager
def open_workspace(config: Config) -> Iterator[Workspace]:
    """Lock the run directory, which has its ``config.yaml``, and open everything in it.

    A run without a journal record never began; its store is created again.
    """
    directory = Path(config.output_dir)
    _prepare_process(config)
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    prepare_sharding(config, accelerator)
    with hold_lock(directory) if accelerator.is_main_process else nullcontext():
        loaded = load_for_training(config)
        mixture = load_mixture(
            config.data, loaded.tokenizer, max_validation=config.evaluation.max_examples
        )
        metrics = load_metrics(config, mixture)
        check_compatibility(config, loaded, mixture, metrics.metrics)
        if config.model.gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.train.compute_dtype is not None:
            compute_in(config.train.compute_dtype, loaded.model, accelerator.device.type)
        model = loaded.model
        compute_dtype = config.train.compute_dtype
        shards = shard_model(accelerator, model, directory / STORE, compute_dtype=compute_dtype)
        optimizer: Any = make_optimizer(config.train, model, seed=config.seed)
        if shards is None:
            model, optimizer = accelerator.prepare(model, optimizer)
        work = Workspace(
            config=config,
            directory=directory,
            accelerator=accelerator,
            loaded=loaded,
            model=model,
            snapshots=Snapshots(loaded.model, config.snapshot_dtype),
            optimizer=getattr(optimizer, "optimizer", optimizer),
            mixture=mixture,
            metrics=metrics,
            shards=shards,
        )
        if not accelerator.is_main_process:
            yield work
            return
        work.files = {**model_files(loaded.model, loaded.tokenizer), **adapter_files(loaded)}
        with Journal(directory / JOURNAL) as work.journal:
            _open_store(work)
            earlier = read(directory / JOURNAL)
            with Trackers(config, earlier) as trackers, _finish_commits(work):
                work.journal_queue = JournalQueue(work.journal, trackers.send)
                yield work


@contextmanager
def _finish_commits(work: Workspace) -> Iterator[None]:
    """At the end, wait for the pending commit and write the records behind it.

    This also happens after an error, because no thread may write to the store after the lock of the
    directory is released.
    """
    try:
        yield
    except BaseException:
        # The first error explains more than a second one from a commit.
        with suppress(Exception):
            work.journal_queue.flush()
        with suppress(Exception):
            if work.timeline is not None:
                work.timeline.wait()
        raise
    work.journal_queue.flush()


def start_record(work: Workspace) -> Record:
    """Return the fields of the ``run_started`` record."""
    config, loaded, metrics = work.config, work.loaded, work.metrics.mixture
    schedule = stage_schedule(
        examples=sum(max(1, round(examples)) for examples in work.proportions.values()),
        batch_size=config.train.batch_size,
        eval_every=config.evaluation.eval_every,
        epochs=config.msft.compute_budget,
    )
    return {
        "version": version("msft-store"),
        "method": config.method,
        "config": to_dict(config),
        "model": {
            "path": config.model.path,
            "parameters": loaded.parameters,
            "trainable": loaded.trainable,
            "layers": loaded.layers,
            "hidden": loaded.hidden,
            "dtype": config.model.dtype,
        },
        "mode": metrics.mode,
        "modes": metrics.other_modes,
        "metric": metrics.name,
        "metrics": dict(metrics.names),
        "overall": metrics.overall,
        "sub_datasets": {
            name: {
                "train": len(sub.train.examples),
                "validation": len(sub.validation.examples),
                "test": len(sub.test.examples) if sub.test else 0,
                "too_long": sub.too_long,
                "cut": sub.cut,
                "set_aside": sub.set_aside,
            }
            for name, sub in work.mixture.items()
        },
        "steps_per_epoch": schedule.steps_per_epoch,
        "full_checkpoint_bytes": loaded.full_bytes,
        "base_bytes": sum(size for _, size in work.base.files) if work.base else 0,
        "base_id": work.base.id if work.base else None,
    }


def _open_store(work: Workspace) -> None:
    """Open the store, or create it for a new run, with the model as its base."""
    path = work.directory / STORE
    if work.journal is None or work.journal.next_seq == 0:
        work.store = _new_store(path)
    else:
        work.store = Store.open(path)
    work.base = work.store.add_base(work.loaded.directory)
    # The loop sets the policy of the strategy before the first commit, so this one evicts nothing.
    policy = work.limit_policy(KeepBest(OVERALL, mode=work.metrics.mixture.mode))
    # An adapter alone has no counterpart in the files of the model.
    is_new = work.config.lora is not None and work.config.lora.modules_to_save is None
    start = None if is_new else work.base
    work.timeline = Timeline(work.store, start, retention=policy, name=work.config.method)
    # After a resume within a stage, commits differ much from this copy until a roll-back renews it.
    work.timeline.resident = work.make_resident()


def _new_store(path: Path) -> Store:
    """Create a store, in place of an empty one of a run that never began."""
    if path.exists():
        try:
            checkpoints = Store.open(path).log()
        except NotAStoreError:  # the process was killed while it created the store
            checkpoints = []
        if checkpoints:
            raise RunError(
                f"the store {path} has {len(checkpoints)} checkpoints, but the run's {JOURNAL} is "
                "gone or empty: restore it, or begin a new run in another output_dir"
            )
        shutil.rmtree(path)
    return Store.create(path)


def _prepare_process(config: Config) -> None:
    """Set the number of threads and choose deterministic kernels."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling would allocate whole weights of which a process keeps only a part.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of libraries; their errors are still printed."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
