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

from importlib import import_module

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

# Each name is imported from its module when it is first used, so that importing the package takes
# no time; type checkers read __init__.pyi instead.
_HOMES: dict[str, tuple[str, ...]] = {
    "timeline.state": ("Commit",),
    "objects.bases": ("Base",),
    "tensors.boxes": ("Box", "Part", "Parts"),
    "maintenance.check": ("Finding", "Report"),
    "maintenance.diff": ("TensorDiff",),
    "errors": (
        "BaseError",
        "BusyError",
        "ConflictError",
        "CorruptedError",
        "InvalidInputError",
        "MismatchError",
        "NotAStoreError",
        "OutOfSpaceError",
        "OverBudgetError",
        "PinnedError",
        "StorageError",
        "StoreError",
        "UnknownCheckpointError",
        "VersionError",
    ),
    "maintenance.gc": ("GcPlan", "GcResult"),
    "storage.lock_files": ("Lock",),
    "objects.manifest": ("Checkpoint",),
    "tensors.nested": ("flatten", "unflatten"),
    "maintenance.repack": ("RepackPlan",),
    "maintenance.repair.plan": ("RepairPlan", "RepairResult"),
    "tensors.resident": ("Resident",),
    "retention": (
        "Candidate",
        "Champions",
        "DiskBudget",
        "KeepBest",
        "KeepLast",
        "KeepThese",
        "PeakWindow",
        "Policy",
        "Reason",
    ),
    "saver": ("AsyncSaver",),
    "maintenance.stats": ("Stats",),
    "store": ("Store",),
    "timeline.timeline": ("Timeline",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("msft-store")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
