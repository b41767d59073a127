"""Lock files as other processes would leave them, here and elsewhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from msft_store import Store
from msft_store.storage.lock_files import (
    EXPIRY_SECONDS,
    LOCKS,
    Process,
    create_lock_file,
    lock_name,
)

ELSEWHERE = Process(
    pid=1234, start=5678, boot="0123456789ab", namespace="0123456789ab", machine="0123456789ab"
)
"""A process on another machine."""


def here(**changes: str | int) -> Process:
    """Return this process with some fields replaced."""
    return replace(Process.this(), **changes)


def plant(
    store: Store,
    process: Process,
    *,
    shared: bool = False,
    purpose: str = "gc",
    later: float = 0.0,
) -> Path:
    """Write a lock of a process, asked for now or some seconds later; return its file."""
    fields = lock_name(shared=shared, purpose=purpose, process=process).split("_")
    fields[1] = str(int(fields[1]) + int(later * 1e9))
    folder, name = Path(store.path, LOCKS), "_".join(fields)
    create_lock_file(folder, name)
    return folder / name


def silence(lock: Path) -> None:
    """Set the last renewal of a lock back so that it has expired."""
    before = os.stat(lock).st_mtime - EXPIRY_SECONDS - 1
    os.utime(lock, (before, before))
