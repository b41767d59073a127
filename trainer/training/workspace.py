"""What a run works with: its directory, model, data, journal and store, put together.

Every process of a run has the model and the data. The main process alone writes: the others have no
journal and no timeline, and get decisions and restored weights from it.

Example::

    create_directory(config)
    with open_workspace(config) as work:
        ...
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast

from msft_store import (
    Base,
    DiskBudget,
    KeepBest,
    KeepLast,
    NotAStoreError,
    Policy,
    Resident,
    Store,
    Timeline,
)
from trainer.algorithms import metric_mode
from trainer.config.checks import to_bytes
from trainer.config.load import to_dict
from trainer.config.schema import OVERALL, Config
from trainer.data.examples import Example, Mixture
from trainer.data.load import load_mixture
from trainer.data.sampling import shares
from trainer.data.schedule import stage_schedule
from trainer.errors import RunError
from trainer.journal import Journal, JournalQueue, Record, read
from trainer.model.forward import compute_in
from trainer.model.load import LoadedModel
from trainer.model.lora import load_trained
from trainer.model.optim import make_optimizer
from trainer.model.sharding import Shards, check_sharded, load_once, split
from trainer.model.training_state import put_back, weights_alone
from trainer.model.weights import Snapshots, weights_of
from trainer.training.directory import JOURNAL, STORE, locked
from trainer.training.preflight import check
from trainer.training.trackers import tracking

RESULT = "result"
"""The ref that points to a finished run's result."""


@dataclass(kw_only=True)
class Workspace:
    """An open run directory and all that training needs."""

    config: Config
    directory: Path
    accelerator: Accelerator
    loaded: LoadedModel
    model: Any
    """The model as Accelerate prepared it."""
    snapshots: Snapshots
    """Its weights as checkpoints hold them."""
    optimizer: Any
    mixture: Mixture
    journal: Journal | None
    """``None`` in every process but the main one, like ``store``, ``base`` and ``timeline``."""
    journal_queue: JournalQueue
    """Through which everything is written to the journal."""
    store: Store | None
    base: Base | None
    timeline: Timeline | None
    shards: Shards | None
    """Where no process has the whole model, how they commit and restore it together."""

    def record(self, event: str, **fields: Any) -> None:
        """Write to the journal, in the main process, behind what waits for a commit."""
        self.journal_queue.add(event, **fields)

    @property
    def max_disk(self) -> int | None:
        """The bytes that the store may take at most; ``None``: as many as the disk has."""
        size = self.config.max_disk
        return None if size is None else to_bytes(size, self.loaded.full_bytes)

    def limited(self, policy: Policy) -> Policy:
        """Return a policy that also keeps within ``max_disk``."""
        return policy if self.max_disk is None else policy | DiskBudget(self.max_disk)

    def split(self, name: str) -> dict[str, Sequence[Example]]:
        """Return the examples of ``train``, ``validation`` or ``test`` by sub-dataset."""
        splits = {key: getattr(sub, name) for key, sub in self.mixture.items()}
        return {key: split.examples for key, split in splits.items() if split is not None}

    def resident(self) -> Resident | None:
        """Return a copy of the weights as they are, for the timeline, where one is wanted."""
        return Resident(self.snapshots.take()) if self.config.resident_reference else None

    @property
    def proportions(self) -> dict[str, float]:
        """The sub-datasets in the order of the configuration, and their examples in an epoch."""
        data, sizes = self.config.data, self.train_sizes
        sampled = shares(sizes, data.sampling, data.temperature)
        order = [*self.config.data.sub_datasets, *sizes]
        return {name: sizes[name] * sampled[name] for name in order if name in sizes}

    @property
    def train_sizes(self) -> dict[str, int]:
        """Training examples by sub-dataset."""
        return {name: len(sub.train.examples) for name, sub in self.mixture.items()}

    def begin_stage(self, number: int, root: str | None, policy: Policy) -> None:
        """Restore what stage ``number`` begins from (``None``: the base's weights).

        The timeline has a branch for each stage. It rolls back to the root; where that was done
        before a kill, it forgets what the stage has committed since.
        """
        whole = root is not None and self.config.restores_optimizer
        tensors: dict[str, torch.Tensor] = {}
        if self.timeline is not None and self.store is not None:
            self.timeline.retention = self.limited(policy)
            if root is None:
                self.timeline.rewind(0)
            elif self.timeline.branch < number - 1:
                tensors = self._roll_back(self.timeline, root, whole=whole)
            else:
                self.timeline.rewind(1)
                tensors = self._load(self.store, root, whole=whole)
        self._take(tensors, root, whole=whole)

    def restore(self, checkpoint: str) -> None:
        """Restore what a checkpoint of this stage holds, in all processes; the stage goes on."""
        whole = self.config.restores_optimizer
        tensors = {} if self.store is None else self._load(self.store, checkpoint, whole=whole)
        self._take(tensors, checkpoint, whole=whole)

    def end_at(self, checkpoint: str) -> None:
        """Restore the result's weights in all processes; nothing else is kept in the store.

        It becomes the last root, so that restoring it needs nothing but the base.
        """
        if self.timeline is not None and self.store is not None:
            if self.config.restores_optimizer:
                checkpoint = weights_alone(self.store, checkpoint, name=RESULT)
                self.timeline.retention = self.limited(KeepLast(1))
            self.store.pin(checkpoint, RESULT)
            self._roll_back(self.timeline, checkpoint, whole=False)
        self._share_weights(checkpoint)

    def _roll_back(
        self, timeline: Timeline, checkpoint: str, *, whole: bool
    ) -> dict[str, torch.Tensor]:
        """Restore the model from a checkpoint; of a ``whole`` one, return all tensors instead."""
        if whole:
            # What it would renew is on the host, and the optimizer's too.
            timeline.resident = None
            tensors = timeline.rollback(checkpoint)
            self.snapshots.put_back(tensors)
            timeline.resident = self.resident()
        else:
            tensors = {}
            room = self.snapshots.room()
            timeline.rollback(
                checkpoint, into=room if self.shards is None else self.shards.boxes(room)
            )
            self.snapshots.put_back(room)
        done = timeline.last_commit
        if done is not None:
            sizes = {"disk_peak_bytes": done.peak_bytes, "disk_bytes": done.bytes}
            self.record("rolled_back", checkpoint=checkpoint, **sizes)
        return tensors

    def _load(self, store: Store, checkpoint: str, *, whole: bool) -> dict[str, torch.Tensor]:
        """Do the same without a new branch."""
        if whole:
            return store.load(checkpoint)
        room = self.snapshots.room()
        if self.shards is None:
            store.load_into(room, checkpoint)
        else:
            store.load_boxes(checkpoint, self.shards.boxes(room))
        self.snapshots.put_back(room)
        return {}

    def _take(
        self, tensors: dict[str, torch.Tensor], checkpoint: str | None, *, whole: bool
    ) -> None:
        """Give all processes the main process's weights; of a ``whole`` checkpoint, the rest."""
        if whole:
            if tensors:
                self.snapshots.put_back(tensors)
            put_back(tensors, self.optimizer, self.accelerator)
        self._share_weights(checkpoint)

    def _share_weights(self, checkpoint: str | None) -> None:
        """Give the main process's weights, or each one's part of a checkpoint, to all others."""
        if self.shards is not None:
            self.accelerator.wait_for_everyone()
            if checkpoint is not None and self.store is None:
                room = self.snapshots.room()
                self.shards.load(checkpoint, room)
                self.snapshots.put_back(room)
        elif self.accelerator.num_processes > 1:
            for tensor in weights_of(self.loaded.model).values():
                broadcast(tensor)


@contextmanager
def open_workspace(
    config: Config, *, warn: Callable[[str], None] = lambda line: None
) -> Iterator[Workspace]:
    """Lock the run directory, which has its ``config.yaml``, and put everything together.

    A journal without a record, or none, is a run that never began: its store is made anew.
    ``warn`` gets a line for people where something fails that training can do without.
    """
    directory = Path(config.output_dir)
    _prepare_process(config)
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    check_sharded(config, accelerator)
    load_once()
    with locked(directory, accelerator.is_main_process):
        loaded = load_trained(config)
        mixture = load_mixture(
            config.data, loaded.tokenizer, max_validation=config.evaluation.max_examples
        )
        check(config, loaded, mixture)
        if config.model.gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.train.compute_dtype is not None:
            compute_in(config.train.compute_dtype, loaded.model, accelerator.device.type)
        model = loaded.model
        compute_dtype = config.train.compute_dtype
        shards = split(accelerator, model, directory / STORE, compute_dtype=compute_dtype)
        optimizer: Any = make_optimizer(config.train, model)
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
            journal=None,
            journal_queue=JournalQueue(None),
            store=None,
            base=None,
            timeline=None,
            shards=shards,
        )
        if not accelerator.is_main_process:
            yield work
            return
        with Journal.open(directory / JOURNAL) as work.journal:
            _open_store(work)
            earlier = read(directory / JOURNAL)
            with tracking(config, earlier, warn=warn) as told, _settled(work):
                work.journal_queue = JournalQueue(work.journal, told)
                yield work


@contextmanager
def _settled(work: Workspace) -> Iterator[None]:
    """At the end, wait for the commit under way and write what waits for it, after an error too.

    Nothing may go on in the store once the directory's lock is given back.
    """
    try:
        yield
    except BaseException:
        # The error that is on its way says more than one that a commit may add.
        with suppress(Exception):
            work.journal_queue.settle()
        with suppress(Exception):
            if work.timeline is not None:
                work.timeline.wait()
        raise
    work.journal_queue.settle()


def start_record(work: Workspace) -> Record:
    """Return the fields of ``run_started``."""
    config, loaded = work.config, work.loaded
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
        "mode": metric_mode(config),
        "metric": config.evaluation.metric,
        "sub_datasets": {
            name: {
                "train": len(sub.train.examples),
                "validation": len(sub.validation.examples),
                "test": len(sub.test.examples) if sub.test else 0,
                "too_long": sub.too_long,
                "set_aside": sub.set_aside,
            }
            for name, sub in work.mixture.items()
        },
        "steps_per_epoch": schedule.steps_per_epoch,
        "full_checkpoint_bytes": loaded.full_bytes,
        "base_bytes": loaded.base_bytes,
        "base_id": work.base.id if work.base else None,
    }


def _open_store(work: Workspace) -> None:
    path = work.directory / STORE
    if work.journal is None or work.journal.next_seq == 0:
        work.store = _new_store(path)
    else:
        work.store = Store.open(path)
    work.base = work.store.add_base(work.loaded.directory)
    # The loop sets what a strategy needs before each commit; nothing is evicted until then.
    policy = work.limited(KeepBest(OVERALL, mode=metric_mode(work.config)))
    work.timeline = Timeline(work.store, work.base, retention=policy, name=work.config.method)
    # In the middle of a stage, nothing will be like it until the next roll-back renews it.
    work.timeline.resident = work.resident()


def _new_store(path: Path) -> Store:
    """Create a store where a run that never began may have left one."""
    if path.exists():
        try:
            checkpoints = Store.open(path).log()
        except NotAStoreError:  # a kill came before it was one
            checkpoints = []
        if checkpoints:
            raise RunError(
                f"the store {path} has {len(checkpoints)} checkpoints, but the run's {JOURNAL} is "
                "gone or empty: restore it, or begin a new run in another output_dir"
            )
        shutil.rmtree(path)
    return Store.create(path)


def _prepare_process(config: Config) -> None:
    """Set threads and repeatable kernels."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It would write to the memory of weights that a process is to have a part of only.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False


def quiet_libraries() -> None:
    """Let libraries print errors only: their advice is for programmers, not for users of a run."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
