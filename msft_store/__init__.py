"""A content-addressed delta store for model checkpoints.

A checkpoint costs only what changed: chunks that are equal to the base model or to another
checkpoint cost nothing, the others are kept as compressed differences, and every restore is
bit-exact and verified. Every error that this package raises on purpose is a :class:`StoreError`.

Example::

    from msft_store import KeepBest, Store, Timeline

    store = Store.create("run/store")
    base = store.add_base("Qwen2.5-0.5B")
    timeline = Timeline(store, base, retention=KeepBest("overall", 3))
    ckpt = timeline.commit(model.state_dict(), step=10, metrics={"overall": 0.41})
    timeline.rollback(ckpt, into=model)
"""

from msft_store.alive import Commit
from msft_store.bases import Base
from msft_store.boxes import Box, Part, Parts
from msft_store.check import Finding, Report
from msft_store.diff import TensorDiff
from msft_store.errors import (
    BaseError,
    BusyError,
    ConflictError,
    CorruptedError,
    InvalidInputError,
    MismatchError,
    NotAStoreError,
    OutOfSpaceError,
    OverBudgetError,
    PinnedError,
    StorageError,
    StoreError,
    UnknownCheckpointError,
    VersionError,
)
from msft_store.gc import GcPlan, GcResult
from msft_store.lockfiles import Lock
from msft_store.manifest import Checkpoint
from msft_store.nested import flatten, unflatten
from msft_store.repack import RepackPlan
from msft_store.repair import RepairPlan, RepairResult
from msft_store.resident import Resident
from msft_store.retention import (
    Candidate,
    Champions,
    DiskBudget,
    KeepBest,
    KeepLast,
    KeepThese,
    PeakWindow,
    Policy,
    Reason,
)
from msft_store.saver import AsyncSaver
from msft_store.stats import Stats
from msft_store.store import Store
from msft_store.timeline import Timeline

__all__ = [
    "AsyncSaver",
    "Base",
    "BaseError",
    "Box",
    "BusyError",
    "Candidate",
    "Champions",
    "Checkpoint",
    "Commit",
    "ConflictError",
    "CorruptedError",
    "DiskBudget",
    "Finding",
    "GcPlan",
    "GcResult",
    "InvalidInputError",
    "KeepBest",
    "KeepLast",
    "KeepThese",
    "Lock",
    "MismatchError",
    "NotAStoreError",
    "OutOfSpaceError",
    "OverBudgetError",
    "Part",
    "Parts",
    "PeakWindow",
    "PinnedError",
    "Policy",
    "Reason",
    "RepackPlan",
    "RepairPlan",
    "RepairResult",
    "Report",
    "Resident",
    "Stats",
    "StorageError",
    "Store",
    "StoreError",
    "TensorDiff",
    "Timeline",
    "UnknownCheckpointError",
    "VersionError",
    "flatten",
    "unflatten",
]
