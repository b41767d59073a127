"""Lock files: empty files whose names say whose they are, and their times whether the owner lives.

As a name is there whole or not at all, there are no half-written locks, and a full disk has room
for one. The modification time is the owner's last sign of life.

Example::

    name = name_of(shared=True, purpose="save", process=Process.this())
    now = create(folder, name)
    look(folder, now=now, here=Process.this())

Which process is this, and does another one still run?

A process is known again by its id together with when it started, on a machine that is known by its
boot. Where that cannot be told (a container, another machine, a system without ``/proc``), the
answer is "elsewhere", never a guess.

Example::

    process_status(Process.this(), Process.this())      # "alive"
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ProcessStatus = Literal["alive", "dead", "elsewhere"]

UNKNOWN = "0"
_FIRST_NAMESPACE = "pid:[4026531836]"
"""What Linux names the process ids outside all containers."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process and where it runs; digests in hex, :data:`UNKNOWN` for what the system hides."""

    pid: int
    start: int
    """Clock ticks from the boot of the machine to the start of the process; 0: unknown."""
    boot: str
    namespace: str
    """In which ``pid`` and ``start`` have their meaning; another one in each container."""
    machine: str
    """The same after a reboot; unknown in a container, which may be copied to other machines."""

    @classmethod
    def this(cls) -> Process:
        """Return the process that runs this."""
        pid_namespace, time_namespace = _link("/proc/self/ns/pid"), _link("/proc/self/ns/time")
        identity = _text("/etc/machine-id") if pid_namespace == _FIRST_NAMESPACE else ""
        stat = _stat("self")
        return cls(
            pid=os.getpid(),
            start=stat.start if stat is not None else 0,
            boot=_digest(_text("/proc/sys/kernel/random/boot_id")),
            namespace=_digest(pid_namespace, time_namespace),
            machine=_digest(identity, socket.gethostname()),
        )


def process_status(process: Process, here: Process) -> ProcessStatus:
    """Return what can be told of a process from here."""
    if UNKNOWN in (process.boot, here.boot):
        return "elsewhere"
    if process.boot != here.boot:
        same = process.machine == here.machine != UNKNOWN
        return "dead" if same else "elsewhere"
    if process.namespace != here.namespace or UNKNOWN in (process.namespace, here.namespace):
        return "elsewhere"
    return "alive" if _runs(process) else "dead"


def _runs(process: Process) -> bool:
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is there, and somebody else's.
        pass
    stat = _stat(str(process.pid))
    # The system may hide other users' processes.
    return stat is None or (stat.runs and (process.start in (0, stat.start)))


@dataclass(frozen=True, kw_only=True)
class _Stat:
    start: int
    runs: bool


def _stat(process: str) -> _Stat | None:
    # The second field is the program's name in brackets, in which anything may stand.
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    try:
        state, threads, start = fields[0], int(fields[17]), int(fields[19])
    except (IndexError, ValueError):
        return None
    # A killed process stays on the list until its parent has asked for it, but does nothing.
    return _Stat(start=start, runs=state not in "ZX" or threads > 1)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _digest(*parts: str) -> str:
    """Return a short digest; unknown if the first part is."""
    if not parts[0]:
        return UNKNOWN
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


LOCKS = "locks"
EXPIRY_SECONDS = 300.0
"""Silence after which an owner that cannot be asked is taken for dead."""
_NAME = re.compile(
    r"(?P<mode>shared|exclusive)_(?P<since>[0-9]{1,19})_(?P<number>[0-9a-f]{8})"
    r"_(?P<machine>[0-9a-f]{1,12})_(?P<boot>[0-9a-f]{1,12})_(?P<namespace>[0-9a-f]{1,12})"
    r"_(?P<pid>[0-9]{1,9})_(?P<start>[0-9]{1,19})"
    r"_(?P<purpose>[A-Za-z0-9.-]{1,20})_(?P<host>[A-Za-z0-9.-]{1,24})"
)

QueuePosition = tuple[int, str]
"""One total order, so that of all requests one is first: by time asked for, then by name."""
Owner = Literal["alive", "dead", "elsewhere", "silent"]


@dataclass(frozen=True, kw_only=True)
class Lock:
    """Somebody's lock on a store."""

    path: str
    """Relative to the store."""
    shared: bool
    purpose: str
    """What the owner does, such as ``save`` or ``gc``."""
    host: str
    pid: int
    since: int
    """When it was asked for, by the owner's clock (nanoseconds since 1970)."""
    silent_seconds: float
    """Time since the owner's last sign of life."""
    owner: Owner
    """``alive`` or ``dead`` where that can be known, on this machine; else ``elsewhere``, or
    ``silent`` if there was no sign of life for so long that it counts as dead."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.rpartition("/")[2]

    @property
    def turn(self) -> QueuePosition:
        """What requests are ordered by."""
        return queue_position(self.name)

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(
            min(self.since, 1 << 62) / 1e9, datetime.timezone.utc
        )
        return (
            f"{self.purpose} by process {self.pid} on {self.host} "
            f"({'shared' if self.shared else 'exclusive'}, since {since:%Y-%m-%d %H:%M:%S} UTC, "
            f"{self.owner}, last sign of life {max(self.silent_seconds, 0.0):.0f} s ago)"
        )


def lock_name(*, shared: bool, purpose: str, process: Process) -> str:
    """Return the name of a new lock of a process, asked for now."""
    return "_".join(
        (
            "shared" if shared else "exclusive",
            str(time.time_ns()),
            secrets.token_hex(4),
            process.machine,
            process.boot,
            process.namespace,
            str(process.pid),
            str(process.start),
            _plain(purpose, 20),
            _plain(socket.gethostname(), 24),
        )
    )


def queue_position(name: str) -> QueuePosition:
    """Return the place of a lock among others."""
    found = _NAME.fullmatch(name)
    return int(found["since"]) if found else 0, name


def create_lock_file(folder: Path, name: str) -> float:
    """Create a lock, and the folder if it is not there; return the file system's time."""
    make_locks_folder(folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(folder / name, flags, 0o666)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def make_locks_folder(folder: Path) -> None:
    """Make the folder of locks if it is not there; ``OSError`` if it is a link."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if os.path.islink(folder):
        raise OSError(errno.ELOOP, "it is a symbolic link; a store's folders are its own")


def remove_lock_file(path: Path) -> None:
    """Remove a lock; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def list_locks(folder: Path, *, now: float, here: Process) -> list[Lock]:
    """Return all locks, oldest request first; ``now`` is by the file system's clock (seconds).

    A name of another form is somebody's exclusive lock; one that begins with a dot is none.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    locks = []
    for name in names:
        if not name.startswith("."):
            # It may go between the listing and the look at it.
            with contextlib.suppress(FileNotFoundError):
                locks.append(_read(name, now - os.stat(folder / name).st_mtime, here))
    return sorted(locks, key=lambda lock: lock.turn)


def _read(name: str, silent_seconds: float, here: Process) -> Lock:
    found = _NAME.fullmatch(name)
    owner: Owner = "elsewhere"
    if found is not None:
        process = Process(
            pid=int(found["pid"]),
            start=int(found["start"]),
            boot=found["boot"],
            namespace=found["namespace"],
            machine=found["machine"],
        )
        owner = process_status(process, here)
    if owner == "elsewhere" and silent_seconds > EXPIRY_SECONDS:
        owner = "silent"
    return Lock(
        path=f"{LOCKS}/{name}",
        shared=found is not None and found["mode"] == "shared",
        purpose=found["purpose"] if found else "something",
        host=found["host"] if found else "unknown",
        pid=int(found["pid"]) if found else 0,
        since=int(found["since"]) if found else 0,
        silent_seconds=silent_seconds,
        owner=owner,
    )


def _plain(text: str, length: int) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", text)[:length] or "unknown"
