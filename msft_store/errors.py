"""The store's exceptions, grouped by what a handler would do.

StoreError
├── NotAStoreError          the path holds no store, or already holds one
├── VersionError            the data has a format version that this release does not know
├── UnknownCheckpointError  no checkpoint, base or ref has the given name
├── InvalidInputError       the store cannot keep or does not understand an argument
├── MismatchError           tensors and checkpoint differ in names, shapes or dtypes
├── PinnedError             a ref protects the checkpoint that was to be removed
├── BaseError               a base's files are missing, changed, or not safetensors
├── CorruptedError          stored bytes are not the bytes that were written
├── ConflictError           another store moved the ref to a checkpoint unknown here
├── BusyError               another process holds the store's lock, or removed ours
├── OutOfSpaceError         the disk is full
├── OverBudgetError         the checkpoints that must be kept exceed a disk budget
└── StorageError            any other failure of the file system

Example::

    from msft_store import NotAStoreError, Store

    try:
        store = Store.open("runs/none")
    except NotAStoreError as error:
        print(error)
"""

from __future__ import annotations

import collections.abc
import errno

REPAIR_HINT = "msft-store check names what is still sound, msft-store repair keeps it"
"""The advice that ends every message about damage."""


class StoreError(Exception):
    """The base class of every error that this package raises on purpose.

    The message says what happened, where, and what to do next.

    Attributes:
        file: Path of the damaged file, or ``None`` if the error concerns no single file.
    """

    def __init__(self, message: str = "", *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


def strip_hint(error: StoreError) -> str:
    """Return the message of an error without the repair advice."""
    return str(error).removesuffix(f"; {REPAIR_HINT}")


def strip_frames(error: StoreError) -> StoreError:
    """Return an error that can be kept: its frames are removed, because they hold tensors.

    The cause stays if it is an :class:`OSError`: it tells a bad disk from an unreachable one.
    """
    cause = error.__cause__
    error.__traceback__ = error.__context__ = error.__cause__ = None
    if isinstance(cause, OSError):
        cause.__traceback__ = cause.__context__ = cause.__cause__ = None
        error.__cause__ = cause
    return error


class NotAStoreError(StoreError):
    """The path holds no store, or already holds one."""


class VersionError(StoreError):
    """The data was written in a format version that this release does not know."""


class UnknownCheckpointError(StoreError):
    """No checkpoint, base or ref has the given name."""


class InvalidInputError(StoreError):
    """The store cannot keep an argument or does not understand it."""


class MismatchError(StoreError):
    """A module and a checkpoint differ in the names, shapes or dtypes of their tensors."""


class PinnedError(StoreError):
    """A ref protects the checkpoint that was to be removed."""


class BaseError(StoreError):
    """A base's files are missing, are not valid safetensors, or changed since they were added."""


class CorruptedError(StoreError):
    """Stored bytes are not the bytes that were written."""


class ConflictError(StoreError):
    """Another store moved a ref to a checkpoint that this store does not have."""


class BusyError(StoreError):
    """Another process holds the store's lock, or removed the lock of this process."""


class OutOfSpaceError(StoreError):
    """The disk or its quota is full."""


class OverBudgetError(StoreError):
    """The checkpoints that must be kept do not fit into the disk budget."""


class StorageError(StoreError):
    """The file system refused an operation."""


def is_damage(error: StoreError) -> bool:
    """Return true if stored bytes are lost, false if they are only out of reach.

    Of all file system failures only EIO (a bad disk) counts as lost: others may be temporary.
    """
    if isinstance(error, StorageError):
        return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO
    return not isinstance(error, VersionError | BaseError)


def require_damage(errors: collections.abc.Iterable[StoreError]) -> None:
    """Raise the first error that is not damage."""
    for error in errors:
        if not is_damage(error):
            raise error
