"""Lock files: empty files whose names describe their owner and whose times show that it lives.

A file name appears completely or not at all, so there are no half-written locks, and even a full
disk has room for one. The modification time is the owner's last sign of life. A process is
identified by its pid and start time, and its machine by the boot id. If that cannot be read (in a
container, on another machine, or without ``/proc``), the status is "elsewhere", never a guess.

Example::

    here = Process.this()
    now = create_lock_file(folder, lock_name(shared=True, purpose="save", process=here))
    list_locks(folder, now=now, here=here)
    process_status(here, here)      # "alive"
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
"""Name that Linux gives to the pid namespace outside all containers."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process and its machine; digests in hex, :data:`UNKNOWN` if the system hides a value."""

    pid: int
    start: int
    """Clock ticks from the boot of the machine to the start of the process; 0 if unknown."""
    boot: str
    namespace: str
    """Digest of the namespace in which ``pid`` and ``start`` are valid; each container has its own.
    """
    machine: str
    """Stays the same after a reboot; unknown in a container, which may be copied to other machines.
    """

    @classmethod
    def this(cls) -> Process:
        """Return the running process."""
        pid_namespace, time_namespace = _link("/proc/self/ns/pid"), _link("/proc/self/ns/time")
        identity = _text("/etc/machine-id") if pid_namespace == _FIRST_NAMESPACE else ""
        stat = _stat("self")
        return cls(
            pid=os.getpid(),
            start=stat[0] if stat is not None else 0,
            boot=_digest(_text("/proc/sys/kernel/random/boot_id")),
            namespace=_digest(pid_namespace, time_namespace),
            machine=_digest(identity, socket.gethostname()),
        )


def process_status(process: Process, here: Process) -> ProcessStatus:
    """Return what can be known about a process from here."""
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
        # The process exists but belongs to another user.
        pass
    stat = _stat(str(process.pid))
    # A process without status counts as running: the system may hide other users' processes.
    return stat is None or (stat[1] and process.start in (0, stat[0]))


def _stat(process: str) -> tuple[int, bool] | None:
    """Return the start time of a process, and True if it runs; ``None`` if that is unknown."""
    # The second field is the program's name in brackets, which may contain any character.
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    try:
        state, threads, start = fields[0], int(fields[17]), int(fields[19])
    except (IndexError, ValueError):
        return None
    # A killed process stays listed as a zombie until its parent waits for it.
    return start, state not in "ZX" or threads > 1


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _digest(*parts: str) -> str:
    """Return a short digest; :data:`UNKNOWN` if the first part is empty."""
    if not parts[0]:
        return UNKNOWN
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


LOCKS = "locks"
EXPIRY_SECONDS = 300.0
"""Seconds of silence after which an owner that cannot be checked counts as dead."""
_CLOCK_ERROR_SECONDS = 5.0
"""Seconds by which the clocks of machines and file systems may differ without being mentioned."""
_NAME = re.compile(
    r"(?P<mode>shared|exclusive)_(?P<since>[0-9]{1,19})_(?P<number>[0-9a-f]{8})"
    r"_(?P<machine>[0-9a-f]{1,12})_(?P<boot>[0-9a-f]{1,12})_(?P<namespace>[0-9a-f]{1,12})"
    r"_(?P<pid>[0-9]{1,9})_(?P<start>[0-9]{1,19})"
    r"_(?P<purpose>[A-Za-z0-9.-]{1,20})_(?P<host>[A-Za-z0-9.-]{1,24})"
)

QueuePosition = tuple[int, str]
"""A total order of requests, so that one of them is first: by request time, then by name."""
Owner = Literal["alive", "dead", "elsewhere", "silent"]


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock on a store.

    Attributes:
        path: Path relative to the store.
        shared: True if other shared owners may hold the store at the same time.
        purpose: The owner's operation, such as ``save`` or ``gc``.
        host: Name of the owner's machine.
        pid: Process id of the owner.
        since: Time of the request by the owner's clock, in nanoseconds since 1970.
        silent_seconds: Seconds since the owner's last sign of life; negative if that is dated in
            the future.
        owner: ``alive`` or ``dead`` if that can be known on this machine; otherwise ``elsewhere``,
            or ``silent`` after so many seconds without a sign of life that the owner counts as
            dead.
    """

    path: str
    shared: bool
    purpose: str
    host: str
    pid: int
    since: int
    silent_seconds: float
    owner: Owner

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return self.path.rpartition("/")[2]

    @property
    def turn(self) -> QueuePosition:
        """Return the value by which requests are ordered."""
        return queue_position(self.name)

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(
            min(self.since, 1 << 62) / 1e9, datetime.timezone.utc
        )
        sign = f"last sign of life {max(self.silent_seconds, 0.0):.0f} s ago"
        if self.silent_seconds < -_CLOCK_ERROR_SECONDS:
            sign = (
                f"its last sign of life is dated {-self.silent_seconds:.0f} s in the future, so a "
                f"clock was wrong; it expires after {EXPIRY_SECONDS:g} s of waiting without another"
            )
        return (
            f"{self.purpose} by process {self.pid} on {self.host} "
            f"({'shared' if self.shared else 'exclusive'}, since {since:%Y-%m-%d %H:%M:%S} UTC, "
            f"{self.owner}, {sign})"
        )


def lock_name(*, shared: bool, purpose: str, process: Process) -> str:
    """Return the name of a new lock of a process, requested now."""
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
    """Return the position of a lock among all requests."""
    found = _NAME.fullmatch(name)
    return int(found["since"]) if found else 0, name


def create_lock_file(folder: Path, name: str) -> float:
    """Create a lock file, and the folder if necessary; return the time of the file system."""
    make_unlinked_folder(folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(folder / name, flags, 0o666)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def make_unlinked_folder(folder: Path) -> None:
    """Create a folder if it is absent; ``OSError`` if it is a symbolic link."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    refuse_link(folder)


def refuse_link(folder: str | Path) -> None:
    """Raise ``OSError`` if a folder is a symbolic link, which could lead out of the store."""
    if os.path.islink(folder):
        raise OSError(errno.ELOOP, "it is a symbolic link; a store's folders are its own")


def remove_lock_file(path: Path) -> None:
    """Delete a lock file; an absent file is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def list_locks(folder: Path, *, now: float, here: Process) -> list[Lock]:
    """Return all locks, oldest request first; ``now`` is in seconds by the file system's clock.

    A file with an unknown form of name counts as an exclusive lock; a hidden file is no lock.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    locks = []
    for name in names:
        if not name.startswith("."):
            # The file may be deleted after the listing.
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
