"""Claims give a named resource, such as a timeline, to one process at a time.

A claim is a lock of the operating system on an empty file ``locks/.KIND-NAME``, which no reader
takes for a lock of the store. The system frees it when the process ends for any reason, and reports
its owner. If the file system has no such locks, or is not writable, every claim succeeds.

Invariants: a process has one descriptor of such a file, because closing any descriptor would free
the lock. All claims of one name in a process therefore share one entry, which ends with the last of
them. A forked child does not inherit claims, but may claim a resource that its parent still has.

Example::

    claim = acquire_claim(Path("store"), "timeline", "main")
    ...
    claim.end()
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Literal

from msft_store.errors import BusyError
from msft_store.storage.lock_files import LOCKS, make_unlinked_folder

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FILE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
_FLOCK = struct.Struct("hhqqi0q")
"""The 64-bit ``struct flock`` of Linux: type, whence, start, length, process."""
_NOBODY, _UNKNOWN = 0, -1


class _Entry:
    """The only descriptor of a file that this process has locked."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor: int | None = descriptor
        self.process = os.getpid()
        self.users = 0

    def is_current(self) -> bool:
        """Return True if the path still leads to the locked file."""
        return self.descriptor is not None and _is_at(self.descriptor, self.path)

    def free(self) -> None:
        """Delete the file and give up the lock; do nothing if it was given up before."""
        if self.descriptor is not None:
            # Delete while the lock is held, because afterwards the file may be another process's.
            with contextlib.suppress(OSError):
                if _is_at(self.descriptor, self.path):
                    os.unlink(self.path)
            self.close()

    def close(self) -> None:
        """Close the file without deleting it."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class _Registry:
    """The locked files of this process, by real path."""

    def __init__(self) -> None:
        self.of_ancestors: dict[str, int] = {}
        """The process that had each file locked when this one was forked from it."""
        self._entries: dict[str, _Entry] = {}
        self._left: deque[_Entry] = deque()
        """Entries that lost a user but are not yet counted down."""
        self._guard = threading.Lock()
        os.register_at_fork(after_in_child=self._forget_after_fork)

    def enter(self, path: str, what: str) -> _Entry | None:
        """Lock a file, or add a user to its lock; ``None`` if the process works without a lock."""
        with self._guard:
            self._remove_left_users()
            entry = self._entries.pop(path, None)
            if entry is None or not entry.is_current():
                if entry is not None:
                    entry.free()
                entry = _lock_file(path, what, self.of_ancestors.get(path))
                if entry is None:
                    return None
            self._entries[path] = entry
            entry.users += 1
            return entry

    def leave(self, entry: _Entry) -> None:
        """Remove one user.

        Garbage collection may call this at any moment, even while the same thread holds the guard.
        In that case the next call of :meth:`enter` or :meth:`leave` does the work.
        """
        self._left.append(entry)
        if self._guard.acquire(blocking=False):
            try:
                self._remove_left_users()
            finally:
                self._guard.release()

    def end(self, entry: _Entry) -> None:
        """Free an entry, even if it has users."""
        with self._guard:
            self._free(entry)

    def _remove_left_users(self) -> None:
        while self._left:
            entry = self._left.popleft()
            entry.users -= 1
            if entry.users == 0:
                self._free(entry)

    def _free(self, entry: _Entry) -> None:
        if self._entries.get(entry.path) is entry:
            del self._entries[entry.path]
        entry.free()

    def _forget_after_fork(self) -> None:
        # These locks belong to a process, so closing the files here takes nothing from the parent.
        for entry in self._entries.values():
            self.of_ancestors[entry.path] = entry.process
            entry.close()
        self._entries.clear()
        self._left.clear()
        self._guard = threading.Lock()


_registry = _Registry()


class Claim:
    """One user's share in a claim of this process; garbage collection gives it back."""

    def __init__(self, entry: _Entry | None = None) -> None:
        self._entry = entry
        self._leave = weakref.finalize(self, _leave, entry)
        # At exit a save may still be running; the system frees the lock right afterwards.
        self._leave.atexit = False

    def leave(self) -> None:
        """Give back this share; the claim is free once this process has no share left."""
        self._leave()

    def end(self) -> None:
        """Free the claim at once, for every user in this process."""
        self._leave()
        if self._entry is not None:
            _registry.end(self._entry)


def acquire_claim(store: Path, kind: str, name: str) -> Claim:
    """Claim a named resource for this process; :class:`BusyError` if another process has it.

    ``OSError`` if the file system fails for another reason than lacking locks.
    """
    path = os.path.join(os.path.realpath(store), LOCKS, f".{kind}-{name}")
    return Claim(_registry.enter(path, f"{kind} {name!r} of {store}"))


def _lock_file(path: str, what: str, ancestor: int | None) -> _Entry | None:
    """Lock a file; ``None`` if there can be no lock, or if an ancestor has it."""
    while True:
        try:
            descriptor = _open_lock_file(path)
        except OSError as error:
            if error.errno in _NO_FILE:
                return None
            raise
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            outcome = _lock(descriptor)
            if outcome == "unsupported":
                return None
            # The previous owner may have deleted the file in the meantime; then try again.
            if outcome == "locked" and _is_at(descriptor, path):
                stack.pop_all()
                return _Entry(path, descriptor)
            if outcome == "taken":
                holder = _holder(descriptor)
                if ancestor is not None and holder in (_UNKNOWN, ancestor):
                    return None
                if holder != _NOBODY:
                    raise BusyError(
                        f"{what} is in use by {_describe_holder(holder)}; two at once would take "
                        "away each other's work. Wait until that one is done, or give another name"
                    )


def _open_lock_file(path: str) -> int:
    make_unlinked_folder(Path(path).parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    return descriptor


def _lock(descriptor: int) -> Literal["locked", "taken", "unsupported"]:
    """Try to lock a file; "taken" means that another process has locked it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return "taken"
        if error.errno in _NO_LOCKS:
            return "unsupported"
        raise
    return "locked"


def _holder(descriptor: int) -> int:
    """Return the process that has locked a file, or one of the constants."""
    if sys.platform != "linux" or struct.calcsize("P") != 8:
        return _UNKNOWN
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, process = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return _NOBODY
    # For a process in another namespace Linux reports zero or a negative number.
    return process if process > 0 else _UNKNOWN


def _describe_holder(holder: int) -> str:
    if holder == _UNKNOWN:
        return "another process, on another machine or in another container"
    return f"process {holder} on {socket.gethostname()}"


def _is_at(descriptor: int, path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _leave(entry: _Entry | None) -> None:
    if entry is not None:
        _registry.leave(entry)
