"""Which process is this, and does another one still run?

A process is known again by its id together with when it started, on a machine that is known by its
boot. Where that cannot be told (a container, another machine, a system without ``/proc``), the
answer is "elsewhere", never a guess.

Example::

    whereabouts(Process.this(), Process.this())      # "alive"
"""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Whereabouts = Literal["alive", "dead", "elsewhere"]

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


def whereabouts(process: Process, here: Process) -> Whereabouts:
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
