"""Claims: what one process at a time may use, such as a timeline of a name.

A claim is a lock of the operating system on an empty file ``locks/.KIND-NAME``, which no reader
takes for a lock of the store. The system frees it when the process ends, however it ends, and tells
who has it. Where a file system has no such locks, or nothing can be written, all claims succeed.

Invariants: a process has one descriptor of such a file, for closing any of them would give the lock
up; so all claims of a name in one process are one, and it ends with the last of them. A forked
child has no claim of its parent's, but may make it where the parent still has it.

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
from msft_store.storage.lock_files import LOCKS, make_locks_folder

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FILE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
_FLOCK = struct.Struct("hhqqi0q")
"""Linux's ``struct flock`` of 64 bits: type, whence, start, length, process."""
_NOBODY, _UNKNOWN = 0, -1


class _Entry:
    """The one descriptor of a file that this process has locked."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor: int | None = descriptor
        self.process = os.getpid()
        self.users = 0

    def is_there(self) -> bool:
        """Return whether its file is still the one that others would lock."""
        return self.descriptor is not None and _is_at(self.descriptor, self.path)

    def free(self) -> None:
        """Give the lock up; what was given up already stays so."""
        if self.descriptor is not None:
            # Before the lock goes: afterwards the file may be another's.
            with contextlib.suppress(OSError):
                if _is_at(self.descriptor, self.path):
                    os.unlink(self.path)
            self.close()

    def close(self) -> None:
        """Close the file, and leave it there."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class _Registry:
    """What this process has locked, by the real path of the file."""

    def __init__(self) -> None:
        self.of_ancestors: dict[str, int] = {}
        """Which process had what locked when this one was forked from it."""
        self._entries: dict[str, _Entry] = {}
        self._left: deque[_Entry] = deque()
        """A user of each has gone."""
        self._guard = threading.Lock()
        os.register_at_fork(after_in_child=self._forked)

    def enter(self, path: str, what: str) -> _Entry | None:
        """Return the lock of a file with one more user; ``None`` where all goes without."""
        with self._guard:
            self._settle()
            entry = self._entries.pop(path, None)
            if entry is None or not entry.is_there():
                if entry is not None:
                    entry.free()
                entry = _locked(path, what, self.of_ancestors.get(path))
                if entry is None:
                    return None
            self._entries[path] = entry
            entry.users += 1
            return entry

    def leave(self, entry: _Entry) -> None:
        """Have one user less.

        That may be at any moment, for objects are collected at any: also while the guard is held in
        the same thread. Then it is done when the next one enters or leaves.
        """
        self._left.append(entry)
        if self._guard.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._guard.release()

    def end(self, entry: _Entry) -> None:
        """Free it, whoever uses it."""
        with self._guard:
            self._free(entry)

    def _settle(self) -> None:
        while self._left:
            entry = self._left.popleft()
            entry.users -= 1
            if entry.users == 0:
                self._free(entry)

    def _free(self, entry: _Entry) -> None:
        if self._entries.get(entry.path) is entry:
            del self._entries[entry.path]
        entry.free()

    def _forked(self) -> None:
        # Closing them takes nothing from the parent: such a lock is of a process.
        for entry in self._entries.values():
            self.of_ancestors[entry.path] = entry.process
            entry.close()
        self._entries.clear()
        self._left.clear()
        self._guard = threading.Lock()


_registry = _Registry()


class Claim:
    """One user's part in a claim of this process; it is left when this object is collected."""

    def __init__(self, entry: _Entry | None = None) -> None:
        self._entry = entry
        self._leave = weakref.finalize(self, _leave, entry)
        # At the exit something may still be under way; the system frees it right after.
        self._leave.atexit = False

    def leave(self) -> None:
        """Use it no more; it is free once all in this process have left it."""
        self._leave()

    def end(self) -> None:
        """Free it at once, whoever else in this process uses it."""
        self._leave()
        if self._entry is not None:
            _registry.end(self._entry)


def acquire_claim(store: Path, kind: str, name: str) -> Claim:
    """Claim what has a name, for this process; :class:`BusyError` if another one has it.

    ``OSError`` where the file system fails in another way than that it has no locks.
    """
    path = os.path.join(os.path.realpath(store), LOCKS, f".{kind}-{name}")
    return Claim(_registry.enter(path, f"{kind} {name!r} of {store}"))


def _locked(path: str, what: str, ancestor: int | None) -> _Entry | None:
    """Return a file's lock; ``None`` where there can be none, or where an ancestor has it."""
    while True:
        try:
            descriptor = _opened(path)
        except OSError as error:
            if error.errno in _NO_FILE:
                return None
            raise
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            outcome = _lock(descriptor)
            if outcome == "nowhere":
                return None
            # Who had it before may have removed the file meanwhile: then once more.
            if outcome == "here" and _is_at(descriptor, path):
                stack.pop_all()
                return _Entry(path, descriptor)
            if outcome == "elsewhere":
                holder = _holder(descriptor)
                if ancestor is not None and holder in (_UNKNOWN, ancestor):
                    return None
                if holder != _NOBODY:
                    raise BusyError(
                        f"{what} is in use by {_said(holder)}; two at once would take away each "
                        "other's work. Wait until that one is done, or give another name"
                    )


def _opened(path: str) -> int:
    make_locks_folder(Path(path).parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    return descriptor


def _lock(descriptor: int) -> Literal["here", "elsewhere", "nowhere"]:
    """Lock a file, or tell where it is locked; nowhere: the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return "elsewhere"
        if error.errno in _NO_LOCKS:
            return "nowhere"
        raise
    return "here"


def _holder(descriptor: int) -> int:
    """Return the process that has a file locked, or one of the constants."""
    if sys.platform != "linux" or struct.calcsize("P") != 8:
        return _UNKNOWN
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, process = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return _NOBODY
    # Of one that is out of sight, Linux tells no number, or a negative one.
    return process if process > 0 else _UNKNOWN


def _said(holder: int) -> str:
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
