"""The lock of a store, held by many owners at once (shared) or by one alone.

A request creates a lock file first and lists the others afterwards, so at least one of two
conflicting requests sees the other. The younger request then removes its file and waits; the older
one keeps its file and waits. This avoids deadlocks, and every request gets its turn.

Invariants: a lock is removed if its owner is dead. If the owner cannot be checked, it is removed
after :data:`EXPIRY_SECONDS` without an update, by the time of its file or, because clocks can be
wrong, by the time that requests of this object have waited. An owner whose file was removed
(:meth:`Locks.confirm`) changes nothing any more. A thread may take a lock again that it holds. A
forked child does not inherit locks.

Example::

    locks = Locks(Path("store"))
    held = locks.acquire(shared=True, purpose="save")
    ...
    held.release()
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from msft_store.errors import BusyError, InvalidInputError
from msft_store.storage.lock_files import (
    EXPIRY_SECONDS,
    LOCKS,
    Lock,
    Process,
    QueuePosition,
    create_lock_file,
    list_locks,
    lock_name,
    queue_position,
    remove_lock_file,
)

YIELDING = "ranks-save"
"""Purpose of a shared lock that ends when its own thread requests an exclusive lock.

The process that writes the checkpoint of several processes holds it. If its thread starts another
operation meanwhile, the save has failed in another process.
"""
BEAT_SECONDS = 30.0
"""Seconds between two signs of life of an owner."""
TIMEOUT = "MSFT_STORE_LOCK_TIMEOUT"
_TIMEOUT_SECONDS = 600.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_MOST_NAMED = 3
_BEAT_CHANGES = 1.0
"""Seconds by which a sign of life at least changes the time of a file."""

_logger = logging.getLogger(__name__)

Step = Literal["go", "place", "withdraw", "wait"]

# The locks of a thread by store and owner, so that several Locks of one store share one lock.
_of_thread = threading.local()


_Key = tuple[str, Process]


class HeldLock:
    """A lock that this process holds; a thread updates its file's time until it is released."""

    def __init__(self, path: Path, *, shared: bool, purpose: str, ended: Callable[[], object]):
        self.shared = shared
        self.purpose = purpose
        self.process = os.getpid()
        self.depth = 1
        self._path = path
        self._ended = ended
        self._released = threading.Event()
        beats = threading.Thread(target=self._beat, name="msft_store lock", daemon=True)
        # No thread can start while the interpreter exits. The remaining work is short then.
        with contextlib.suppress(RuntimeError):
            beats.start()

    def release(self) -> None:
        """Release the lock once for each acquisition; does nothing in a forked child."""
        self.depth -= 1
        if self.depth == 0:
            self.end()

    def end(self) -> None:
        """Release the lock at once, no matter how often it was acquired."""
        if not self._released.is_set() and self.process == os.getpid():
            self._released.set()
            self._ended()
            remove_lock_file(self._path)

    def exists(self) -> bool:
        """Return True if the lock file still exists; ``OSError`` if that cannot be known."""
        try:
            # Opening the file makes a network file system ask its server; a stat may be cached.
            os.close(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            _touch(self._path)


def _held() -> dict[_Key, HeldLock]:
    found: dict[_Key, HeldLock] = _of_thread.__dict__.setdefault("held", {})
    return found


class _Watch:
    """Measures by this process's own clock for how long lock files have not changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}
        """The time of each file, and when this process first saw it with that time."""

    def is_silent(self, lock: Lock, now: float) -> bool:
        """Return True if an owner gave no sign of life while requests of this process waited."""
        time_of_file, seen = now - lock.silent_seconds, time.monotonic()
        before, since = self._seen.get(lock.name, (time_of_file, seen))
        if abs(time_of_file - before) >= _BEAT_CHANGES:
            since = seen
        self._seen[lock.name] = time_of_file, since
        return lock.owner == "elsewhere" and seen - since > EXPIRY_SECONDS


class Locks:
    """The locks of one store; methods raise ``OSError`` if the file system fails.

    ``timeout`` is the number of seconds to wait for a lock. The default is the value of
    ``MSFT_STORE_LOCK_TIMEOUT``, or ten minutes.
    """

    def __init__(
        self,
        store: Path,
        *,
        timeout: float | None = None,
        identify: Callable[[], Process] = Process.this,
    ) -> None:
        self._store = store
        self._folder = store / LOCKS
        self._timeout = timeout
        self._identify = identify
        self._watch = _Watch()

    def acquire(self, *, shared: bool, purpose: str) -> HeldLock:
        """Wait for the lock; :class:`BusyError` names the owners after the timeout.

        If the thread holds a shared lock and requests an exclusive one, :class:`BusyError` comes at
        once, unless the shared lock is one that yields (:data:`YIELDING`).
        """
        held = self._held_by_this_thread()
        if held is not None and held.purpose == YIELDING and not shared:
            held.end()
            held = None
        if held is not None:
            if held.shared and not shared:
                raise BusyError(
                    f"{purpose} needs {self._store} alone, but the same thread holds its lock for "
                    f"{held.purpose}; let that end first"
                )
            held.depth += 1
            return held
        path = self._wait(shared=shared, purpose=purpose)
        key = self._key()
        held = HeldLock(path, shared=shared, purpose=purpose, ended=lambda: _held().pop(key, None))
        _held()[key] = held
        return held

    def confirm(self) -> None:
        """Raise :class:`BusyError` if a lock that this thread has was taken away."""
        held = self._held_by_this_thread()
        if held is not None and not held.exists():
            raise BusyError(
                f"the lock of {self._store} was taken away from {held.purpose}: it was suspended "
                f"for more than {EXPIRY_SECONDS:g} s, or msft-store unlock was run. It has "
                "changed nothing since; start it again"
            )

    def all(self) -> list[Lock]:
        """Return all locks, oldest request first, with ages by this machine's clock."""
        return list_locks(self._folder, now=time.time(), here=self._identify())

    def unlock(self, *, force: bool) -> list[Lock]:
        """Remove the locks of owners that are dead or count as dead, or all; return them."""
        here = self._identify()
        probe = lock_name(shared=True, purpose="unlock", process=here)
        now = create_lock_file(self._folder, probe)
        remove_lock_file(self._folder / probe)
        locks = list_locks(self._folder, now=now, here=here)
        removed = [lock for lock in locks if force or lock.owner in ("dead", "silent")]
        for lock in removed:
            remove_lock_file(self._store / lock.path)
        return removed

    def _held_by_this_thread(self) -> HeldLock | None:
        held = _held().get(self._key())
        return held if held is not None and held.process == os.getpid() else None

    def _key(self) -> _Key:
        return os.path.realpath(self._store), self._identify()

    def _wait(self, *, shared: bool, purpose: str) -> Path:
        timeout = _default_timeout() if self._timeout is None else self._timeout
        here = self._identify()
        request = _Request(self._folder, self._watch, shared=shared, purpose=purpose, here=here)
        pause, first_wait = _SHORTEST_PAUSE, True
        try:
            request.place()
            while True:
                conflicts = request.conflicts()
                step = next_step(request.turn, request.placed, [lock.turn for lock in conflicts])
                if step == "go":
                    return request.path
                if step == "place":
                    request.place()
                    continue
                if step == "withdraw":
                    request.withdraw()
                if first_wait:
                    _logger.info(
                        "%s waits for the lock of %s: %s", purpose, self._store, conflicts[0]
                    )
                    first_wait = False
                left = timeout - request.seconds()
                if left <= 0:
                    raise BusyError(self._describe_conflicts(purpose, timeout, conflicts))
                request.show_life()
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
        except BaseException:
            request.withdraw()
            raise

    def _describe_conflicts(self, purpose: str, timeout: float, conflicts: Sequence[Lock]) -> str:
        owners = "; ".join(str(lock) for lock in conflicts[:_MOST_NAMED])
        more = len(conflicts) - _MOST_NAMED
        return (
            f"{purpose} waited {timeout:g} s for the lock of {self._store}, which has: {owners}"
            f"{f'; and {more} more' if more > 0 else ''}. Try again when that is done; if it hangs "
            f"or its machine is gone: msft-store --store {self._store} unlock --force"
        )


class _Request:
    """A request for a lock; its file is either placed or withdrawn for the time being."""

    def __init__(
        self, folder: Path, watch: _Watch, *, shared: bool, purpose: str, here: Process
    ) -> None:
        self.placed = False
        self._folder = folder
        self._watch = watch
        self._shared = shared
        self._here = here
        self._name = lock_name(shared=shared, purpose=purpose, process=here)
        self._begun = self._shown = time.monotonic()
        self._zero = 0.0
        """Start of the request by the file system's clock, which all owners share."""

    @property
    def path(self) -> Path:
        return self._folder / self._name

    @property
    def turn(self) -> QueuePosition:
        return queue_position(self._name)

    def seconds(self) -> float:
        """Return the seconds since the start of the request."""
        return time.monotonic() - self._begun

    def place(self) -> None:
        self._zero = create_lock_file(self._folder, self._name) - self.seconds()
        self._shown = time.monotonic()
        self.placed = True

    def withdraw(self) -> None:
        remove_lock_file(self.path)
        self.placed = False

    def show_life(self) -> None:
        if self.placed and time.monotonic() - self._shown >= BEAT_SECONDS:
            self._shown = time.monotonic()
            _touch(self.path)

    def conflicts(self) -> list[Lock]:
        """Return the conflicting locks; remove those of dead owners.

        This also updates ``placed``, because another process may have removed the file.
        """
        now = self._zero + self.seconds()
        locks = list_locks(self._folder, now=now, here=self._here)
        self.placed = any(lock.name == self._name for lock in locks)
        found = []
        for lock in locks:
            if lock.owner == "dead":
                _logger.info("taking over from a dead owner: %s", lock)
                # A lock of a dead owner that cannot be removed does no harm.
                with contextlib.suppress(OSError):
                    remove_lock_file(self._folder / lock.name)
            elif lock.name == self._name or (self._shared and lock.shared):
                continue
            elif lock.owner == "silent" or self._watch.is_silent(lock, now):
                _logger.info("taking over from an owner without a sign of life: %s", lock)
                # Remove it before continuing, because an owner that wakes up checks its own file.
                remove_lock_file(self._folder / lock.name)
            else:
                found.append(lock)
        return found


def next_step(position: QueuePosition, placed: bool, conflicts: Sequence[QueuePosition]) -> Step:
    """Return the next step of a request, given its position and those of conflicting locks.

    A request succeeds only if it sees no conflict after placing its file. The younger request
    withdraws, so the oldest keeps its position and waits only for owners that hold the lock
    already.
    """
    if not conflicts:
        return "go" if placed else "place"
    first = position < min(conflicts)
    if first == placed:
        return "wait"
    return "place" if first else "withdraw"


def _touch(path: Path) -> None:
    # utime never creates a file, so a lock that was taken away stays removed.
    with contextlib.suppress(OSError):
        os.utime(path)


def _default_timeout() -> float:
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or _TIMEOUT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidInputError(f"{TIMEOUT} is a number of seconds, 0 or more, not {text!r}")
    return seconds
