"""The store's exceptions, grouped by what a handler would do.

StoreError
├── NotAStoreError          no store there, or one is there already
├── VersionError            written by a version that this one does not know
├── UnknownCheckpointError  no checkpoint, base or ref of that name
├── InvalidInputError       an argument that the store cannot keep or does not understand
├── MismatchError           tensors and checkpoint differ in names, shapes or dtypes
├── PinnedError             a ref protects what should go
├── BaseError               a base's files are missing, changed, or not safetensors
├── CorruptedError          stored bytes are not what was written
├── ConflictError           a ref was moved elsewhere, by somebody who is not known here
├── BusyError               somebody else holds the store's lock, or took it away
├── OutOfSpaceError         the disk is full
├── OverBudgetError         what must be kept exceeds a disk budget
└── StorageError            any other failure of the file system
"""

from __future__ import annotations

import collections.abc
import errno

REPAIR_HINT = "msft-store check names what is still sound, msft-store repair keeps it"
"""What to do about damage, at the end of messages."""


class StoreError(Exception):
    """The root of everything that this package raises on purpose."""

    def __init__(self, message: str = "", *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        """The file whose bytes are to blame, where one is."""


def strip_hint(error: StoreError) -> str:
    """Return what an error says, without the advice for damage."""
    return str(error).removesuffix(f"; {REPAIR_HINT}")


def strip_frames(error: StoreError) -> StoreError:
    """Return an error to keep, without the frames that it came through: they hold data.

    What the operating system said stays: it tells a bad medium from one that is out of reach.
    """
    said = error.__cause__
    error.__traceback__ = error.__context__ = error.__cause__ = None
    if isinstance(said, OSError):
        said.__traceback__ = said.__context__ = said.__cause__ = None
        error.__cause__ = said
    return error


class NotAStoreError(StoreError):
    """There is no store at a path, or one is there already."""


class VersionError(StoreError):
    """The data was written in a format version that this release does not know."""


class UnknownCheckpointError(StoreError):
    """No checkpoint, base or ref has the given name."""


class InvalidInputError(StoreError):
    """An argument that the store cannot keep or does not understand."""


class MismatchError(StoreError):
    """A module and a checkpoint differ in tensor names, shapes or dtypes."""


class PinnedError(StoreError):
    """A ref protects the checkpoint that should go."""


class BaseError(StoreError):
    """A base's files are missing, not sound safetensors, or not what was added."""


class CorruptedError(StoreError):
    """Stored bytes are not the bytes that were written."""


class ConflictError(StoreError):
    """A ref points somewhere else in another store, to what this one does not have."""


class BusyError(StoreError):
    """Another process holds the store's lock, or removed the one that this process had."""


class OutOfSpaceError(StoreError):
    """The disk, or the quota on it, is full."""


class OverBudgetError(StoreError):
    """What must be kept does not fit into the disk budget."""


class StorageError(StoreError):
    """The file system refused an operation."""


def is_damage(error: StoreError) -> bool:
    """Return whether an error says that stored bytes are lost, and not that they are out of reach.

    A file system that refuses for any other reason than a bad medium may do otherwise tomorrow.
    """
    if isinstance(error, StorageError):
        return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO
    return not isinstance(error, VersionError | BaseError)


def require_damage(errors: collections.abc.Iterable[StoreError]) -> None:
    """Raise the first error that is no damage."""
    for error in errors:
        if not is_damage(error):
            raise error
