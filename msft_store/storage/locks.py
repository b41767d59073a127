"""The store's lock: held by many at once (shared) or by one alone.

Who wants it creates a lock file first and looks at the others afterwards, so that of two that
conflict at least one sees the other. The younger request then takes its file away and waits, the
older one leaves it and waits: no deadlock, and whoever asks gets a turn.

Invariants: a lock of another is removed only if its owner is known to be dead, or is out of sight
and was silent for :data:`EXPIRY_SECONDS`; an owner whose file has gone (:meth:`Locks.confirm`)
changes nothing any more. A thread may take again what it has. A forked child has no lock of its
parent's.

Example::

    locks = Locks(Path("store"))
    held = locks.acquire(shared=True, purpose="save")
    ...
    held.release()
"""

from __future__ import annotations

import contextlib
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
"""The purpose of a shared lock that ends when its own thread wants the store alone: it is held by
the one process that publishes what several save, and if that thread does something else meanwhile,
the save has failed in another process."""
BEAT_SECONDS = 30.0
"""How often an owner shows that it lives."""
TIMEOUT = "MSFT_STORE_LOCK_TIMEOUT"
_TIMEOUT_SECONDS = 600.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_MOST_NAMED = 3

Step = Literal["go", "place", "withdraw", "wait"]

# What a thread has, by store and owner: several Locks of one store in a thread have one lock.
_of_thread = threading.local()


_Key = tuple[str, Process]


class HeldLock:
    """A lock that this process has, and shows that it lives while it does."""

    def __init__(self, path: Path, *, shared: bool, purpose: str, ended: Callable[[], object]):
        self.shared = shared
        self.purpose = purpose
        self.process = os.getpid()
        self.depth = 1
        self._path = path
        self._ended = ended
        self._released = threading.Event()
        beats = threading.Thread(target=self._beat, name="msft_store lock", daemon=True)
        # No thread starts while the interpreter ends; what is left to do then is short.
        with contextlib.suppress(RuntimeError):
            beats.start()

    def release(self) -> None:
        """Give it back, as often as it was taken; in a forked child nothing happens."""
        self.depth -= 1
        if self.depth == 0:
            self.end()

    def end(self) -> None:
        """Give it back, however often it was taken."""
        if not self._released.is_set() and self.process == os.getpid():
            self._released.set()
            self._ended()
            remove_lock_file(self._path)

    def is_there(self) -> bool:
        """Return whether nobody has taken the lock away; ``OSError`` where nothing is known."""
        try:
            # A network file system asks its server when a file is opened, and not always before.
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


class Locks:
    """The locks of one store; methods raise ``OSError`` where the file system fails them.

    ``timeout`` is how many seconds a lock is waited for; by default what
    ``MSFT_STORE_LOCK_TIMEOUT`` says, else ten minutes.
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

    def acquire(self, *, shared: bool, purpose: str) -> HeldLock:
        """Wait for the lock; :class:`BusyError` names the owners when that takes too long.

        So it is, at once, where a thread that has the lock shared wants it alone, unless it has it
        for what is over (:data:`YIELDING`).
        """
        held = self._mine()
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
        held = self._mine()
        if held is not None and not held.is_there():
            raise BusyError(
                f"the lock of {self._store} was taken away from {held.purpose}: it was suspended "
                f"for more than {EXPIRY_SECONDS:g} s, or somebody ran msft-store unlock. It has "
                "changed nothing since; start it again"
            )

    def all(self) -> list[Lock]:
        """Return all locks, oldest request first, with ages by this machine's clock."""
        return list_locks(self._folder, now=time.time(), here=self._identify())

    def unlock(self, *, force: bool) -> list[Lock]:
        """Remove the locks whose owners are dead or count as dead, or all; return them."""
        here = self._identify()
        probe = lock_name(shared=True, purpose="unlock", process=here)
        now = create_lock_file(self._folder, probe)
        remove_lock_file(self._folder / probe)
        locks = list_locks(self._folder, now=now, here=here)
        gone = [lock for lock in locks if force or lock.owner in ("dead", "silent")]
        for lock in gone:
            remove_lock_file(self._store / lock.path)
        return gone

    def _mine(self) -> HeldLock | None:
        held = _held().get(self._key())
        return held if held is not None and held.process == os.getpid() else None

    def _key(self) -> _Key:
        return os.path.realpath(self._store), self._identify()

    def _wait(self, *, shared: bool, purpose: str) -> Path:
        timeout = timeout_seconds() if self._timeout is None else self._timeout
        request = _Request(self._folder, shared=shared, purpose=purpose, here=self._identify())
        pause = _SHORTEST_PAUSE
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
                left = timeout - request.seconds()
                if left <= 0:
                    raise BusyError(self._busy(purpose, timeout, conflicts))
                request.show_life()
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
        except BaseException:
            request.withdraw()
            raise

    def _busy(self, purpose: str, timeout: float, conflicts: Sequence[Lock]) -> str:
        owners = "; ".join(str(lock) for lock in conflicts[:_MOST_NAMED])
        more = len(conflicts) - _MOST_NAMED
        return (
            f"{purpose} waited {timeout:g} s for the lock of {self._store}, which has: {owners}"
            f"{f'; and {more} more' if more > 0 else ''}. Try again when that is done; if it hangs "
            f"or its machine is gone: msft-store --store {self._store} unlock --force"
        )


class _Request:
    """A lock that is asked for; its file is there (placed) or taken away for the time being."""

    def __init__(self, folder: Path, *, shared: bool, purpose: str, here: Process) -> None:
        self.placed = False
        self._folder = folder
        self._shared = shared
        self._here = here
        self._name = lock_name(shared=shared, purpose=purpose, process=here)
        self._begun = self._shown = time.monotonic()
        self._zero = 0.0
        """When it was begun, by the file system's clock, which owners elsewhere go by too."""

    @property
    def path(self) -> Path:
        return self._folder / self._name

    @property
    def turn(self) -> QueuePosition:
        return queue_position(self._name)

    def seconds(self) -> float:
        """Return for how long it has been asked for."""
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
        """Return the locks that stand in the way; those of the dead are removed.

        Also finds out whether this one is still there itself.
        """
        locks = list_locks(self._folder, now=self._zero + self.seconds(), here=self._here)
        self.placed = any(lock.name == self._name for lock in locks)
        found = []
        for lock in locks:
            if lock.owner == "dead":
                # What cannot be removed does no harm.
                with contextlib.suppress(OSError):
                    remove_lock_file(self._folder / lock.name)
            elif lock.name == self._name or (self._shared and lock.shared):
                continue
            elif lock.owner == "silent":
                # It has to be gone before this goes on: an owner that wakes up looks for it.
                remove_lock_file(self._folder / lock.name)
            else:
                found.append(lock)
        return found


def next_step(mine: QueuePosition, placed: bool, conflicts: Sequence[QueuePosition]) -> Step:
    """Return what a request does, whose lock is placed or not, at the sight of those of others.

    It goes ahead only at a look after placing its lock. Whoever is younger makes way, so that the
    oldest keeps its place and has only those before it that go ahead already.
    """
    if not conflicts:
        return "go" if placed else "place"
    first = mine < min(conflicts)
    if first == placed:
        return "wait"
    return "place" if first else "withdraw"


def _touch(path: Path) -> None:
    # A lock that was taken away must not come back, and utime creates nothing.
    with contextlib.suppress(OSError):
        os.utime(path)


def timeout_seconds() -> float:
    """Return how long a lock is waited for, by the environment or by default."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or _TIMEOUT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidInputError(f"{TIMEOUT} is a number of seconds, 0 or more, not {text!r}")
    return seconds
