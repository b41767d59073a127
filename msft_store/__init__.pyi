"""The public names and their types. :mod:`lazy_loader` imports a name when it is first used."""

from .address import open_checkpoint
from .errors import (
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
from .maintenance.check import Finding, Report
from .maintenance.diff import TensorDiff
from .maintenance.gc import GcPlan, GcResult
from .maintenance.reader import CheckpointReader, TensorSlice
from .maintenance.repack import RepackPlan
from .maintenance.repair.plan import RepairPlan, RepairResult
from .maintenance.stats import Stats
from .objects.bases import Base
from .objects.manifest import Checkpoint
from .remote.follow import Follower
from .remote.versions import Version
from .retention import (
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
from .saver import AsyncSaver
from .storage.lock_files import Lock
from .store import Store
from .tensors.boxes import Box, Part, Parts
from .tensors.nested import flatten, unflatten
from .tensors.resident import Resident
from .timeline.state import Commit
from .timeline.timeline import Timeline

__version__: str
__all__ = [
    "AsyncSaver",
    "Base",
    "BaseError",
    "Box",
    "BusyError",
    "Candidate",
    "Champions",
    "Checkpoint",
    "CheckpointReader",
    "Commit",
    "ConflictError",
    "CorruptedError",
    "DiskBudget",
    "Finding",
    "Follower",
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
    "TensorSlice",
    "Timeline",
    "UnknownCheckpointError",
    "Version",
    "VersionError",
    "flatten",
    "open_checkpoint",
    "unflatten",
]
