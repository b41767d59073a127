"""Write files atomically and durably, and report a full disk.

Example::

    write_atomic(run / "report.md", text.encode())
    with enough_space("the resume point", path, needed_bytes=3 * full_bytes):
        ...
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.errors import PausedError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it, sync the directory.

    The temporary files that killed processes left of this file are deleted.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with enough_space("the file", path, needed_bytes=len(content)):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with suppress(OSError), leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        try:
            with temporary.open("wb") as file:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, tree: Any) -> None:
    """Write JSON values to a file, indented, as :func:`write_atomic` does."""
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


@contextmanager
def enough_space(what: str, path: Path, *, needed_bytes: int) -> Iterator[None]:
    """Raise :class:`PausedError` with the bytes that are needed if the disk is full."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise PausedError(
            f"no space left on the disk to write {what} {path}: it needs {needed_bytes:,} "
            f"bytes and {free:,} are free"
        ) from error


def is_full(error: Exception) -> bool:
    """Return True if an error means that the disk or its quota is full."""
    # An error of safetensors has the error number of the system only in its message.
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(f"os error {number})" in str(error) for number in _FULL)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, all durable."""
    if not path.is_dir():
        if not path.parent.is_dir():
            make_directory(path.parent)
        path.mkdir(exist_ok=True)
    # Sync for an existing directory too, because its creator may have been killed before its sync.
    # A parent that may not be read cannot be opened, hence the suppressed error.
    with suppress(PermissionError):
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
