from msft_store.errors import (
    BaseError as BaseError,
)
from msft_store.errors import (
    BusyError as BusyError,
)
from msft_store.errors import (
    ConflictError as ConflictError,
)
from msft_store.errors import (
    CorruptedError as CorruptedError,
)
from msft_store.errors import (
    InvalidInputError as InvalidInputError,
)
from msft_store.errors import (
    MismatchError as MismatchError,
)
from msft_store.errors import (
    NotAStoreError as NotAStoreError,
)
from msft_store.errors import (
    OutOfSpaceError as OutOfSpaceError,
)
from msft_store.errors import (
    OverBudgetError as OverBudgetError,
)
from msft_store.errors import (
    PinnedError as PinnedError,
)
from msft_store.errors import (
    StorageError as StorageError,
)
from msft_store.errors import (
    StoreError as StoreError,
)
from msft_store.errors import (
    UnknownCheckpointError as UnknownCheckpointError,
)
from msft_store.errors import (
    VersionError as VersionError,
)
from msft_store.maintenance.check import (
    Finding as Finding,
)
from msft_store.maintenance.check import (
    Report as Report,
)
from msft_store.maintenance.diff import TensorDiff as TensorDiff
from msft_store.maintenance.gc import (
    GcPlan as GcPlan,
)
from msft_store.maintenance.gc import (
    GcResult as GcResult,
)
from msft_store.maintenance.repack import RepackPlan as RepackPlan
from msft_store.maintenance.repair.plan import (
    RepairPlan as RepairPlan,
)
from msft_store.maintenance.repair.plan import (
    RepairResult as RepairResult,
)
from msft_store.maintenance.stats import Stats as Stats
from msft_store.objects.bases import Base as Base
from msft_store.objects.manifest import Checkpoint as Checkpoint
from msft_store.retention import (
    Candidate as Candidate,
)
from msft_store.retention import (
    Champions as Champions,
)
from msft_store.retention import (
    DiskBudget as DiskBudget,
)
from msft_store.retention import (
    KeepBest as KeepBest,
)
from msft_store.retention import (
    KeepLast as KeepLast,
)
from msft_store.retention import (
    KeepThese as KeepThese,
)
from msft_store.retention import (
    PeakWindow as PeakWindow,
)
from msft_store.retention import (
    Policy as Policy,
)
from msft_store.retention import (
    Reason as Reason,
)
from msft_store.saver import AsyncSaver as AsyncSaver
from msft_store.storage.lock_files import Lock as Lock
from msft_store.store import Store as Store
from msft_store.tensors.boxes import (
    Box as Box,
)
from msft_store.tensors.boxes import (
    Part as Part,
)
from msft_store.tensors.boxes import (
    Parts as Parts,
)
from msft_store.tensors.nested import (
    flatten as flatten,
)
from msft_store.tensors.nested import (
    unflatten as unflatten,
)
from msft_store.tensors.resident import Resident as Resident
from msft_store.timeline.state import Commit as Commit
from msft_store.timeline.timeline import Timeline as Timeline

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
