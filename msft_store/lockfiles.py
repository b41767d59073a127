"""Lock files: empty files whose names say whose they are, and their times whether the owner lives.

As a name is there whole or not at all, there are no half-written locks, and a full disk has room
for one. The modification time is the owner's last sign of life.

Example::

    name = name_of(shared=True, purpose="save", process=Process.this())
    now = create(folder, name)
    look(folder, now=now, here=Process.this())
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msft_store.processes import Process, whereabouts

FOLDER = "locks"
EXPIRY_SECONDS = 300.0
"""Silence after which an owner that cannot be asked is taken for dead."""
_NAME = re.compile(
    r"(?P<mode>shared|exclusive)_(?P<since>[0-9]{1,19})_(?P<number>[0-9a-f]{8})"
    r"_(?P<machine>[0-9a-f]{1,12})_(?P<boot>[0-9a-f]{1,12})_(?P<namespace>[0-9a-f]{1,12})"
    r"_(?P<pid>[0-9]{1,9})_(?P<start>[0-9]{1,19})"
    r"_(?P<purpose>[A-Za-z0-9.-]{1,20})_(?P<host>[A-Za-z0-9.-]{1,24})"
)

Turn = tuple[int, str]
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
    def turn(self) -> Turn:
        """What requests are ordered by."""
        return turn_of(self.name)

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(
            min(self.since, 1 << 62) / 1e9, datetime.timezone.utc
        )
        return (
            f"{self.purpose} by process {self.pid} on {self.host} "
            f"({'shared' if self.shared else 'exclusive'}, since {since:%Y-%m-%d %H:%M:%S} UTC, "
            f"{self.owner}, last sign of life {max(self.silent_seconds, 0.0):.0f} s ago)"
        )


def name_of(*, shared: bool, purpose: str, process: Process) -> str:
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


def turn_of(name: str) -> Turn:
    """Return the place of a lock among others."""
    found = _NAME.fullmatch(name)
    return int(found["since"]) if found else 0, name


def create(folder: Path, name: str) -> float:
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


def remove(path: Path) -> None:
    """Remove a lock; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def look(folder: Path, *, now: float, here: Process) -> list[Lock]:
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
        owner = whereabouts(process, here)
    if owner == "elsewhere" and silent_seconds > EXPIRY_SECONDS:
        owner = "silent"
    return Lock(
        path=f"{FOLDER}/{name}",
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
