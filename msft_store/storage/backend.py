"""Read and write the files of a store through one small protocol, :class:`Backend`.

Invariants: a finalized file is complete and durable, or absent (temporary name, fsync, rename,
fsync of the directory). A failed fsync fails the operation and is never retried. Every failure is a
:class:`StoreError`. Files are read at positions and never mapped, because a truncated mapping kills
the interpreter.

Example::

    backend = LocalBackend(Path("store"))
    backend.make_root()
    with backend.lock(shared=True, purpose="save"), backend.writer() as writer:
        writer.write(b"...")
        writer.finalize("packs/00ff.pack")
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msft_store.errors import CorruptedError, OutOfSpaceError, StorageError
from msft_store.storage.claims import Claim, acquire_claim
from msft_store.storage.lock_files import Lock, make_unlinked_folder, refuse_link
from msft_store.storage.locks import Locks

TEMPORARY = "tmp"
QUARANTINE = "quarantine"
"""Folder of the files that repairs have moved. No reader uses it, and it may be deleted."""
_MOST_AT_ONCE = 1 << 30
_CLOCK_TICK_NS = 20_000_000
"""The longest tick, in nanoseconds, of any file system clock in use."""
MAX_SMALL_FILE_BYTES = 1 << 28
"""Largest size of a file that is read in one call. Only packs may be larger."""


@dataclass(frozen=True)
class FileStat:
    """The size of a file, and a token that changes whenever the file is written.

    Attributes:
        size: Size in bytes.
        version: Two equal versions of one path mean that nothing wrote the file in between.
            ``None`` means that the backend cannot tell; such a file must be read again.
    """

    size: int
    version: Hashable | None = None


class Writer(Protocol):
    """A temporary file. Leaving its context without :meth:`finalize` discards it."""

    @property
    def position(self) -> int:
        """Return the number of bytes written so far."""

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, whose buffer the caller may reuse afterwards.

        Raises:
            OutOfSpaceError: The medium is full.
            StorageError: The write failed in another way.
        """

    def finalize(self, path: str) -> None:
        """Make the file durable and visible at a relative path, replacing any file there.

        Raises:
            BusyError: The lock that the thread held was taken away.
            StorageError: The file could not be made durable.
        """


class Backend(Protocol):
    """Access to the files of one store by relative path, with ``/`` between the parts.

    Implement it to keep a store on another medium. All methods may be called from several threads
    at once. Every failure must be a :class:`StoreError`. The empty path is the store itself.
    """

    def describe(self, path: str) -> str:
        """Return a path as it should appear in error messages."""

    def exists(self, path: str) -> bool:
        """Return True if there is a file at ``path``; a folder does not count."""

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes of a file from ``offset`` on; ``None`` reads to its end.

        There are fewer bytes than ``length`` only at the end of the file.

        Raises:
            StorageError: There is no such file, or it cannot be read.
        """

    def size(self, path: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            StorageError: There is no such file.
        """

    def list(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, sorted; an absent folder has none."""

    def scan(self, folder: str) -> dict[str, FileStat]:
        """Return sizes and versions of all files below a folder by path, sorted by path.

        A file that another process deletes during the scan is left out.
        """

    def writer(self) -> contextlib.AbstractContextManager[Writer]:
        """Open a temporary file; :meth:`Writer.finalize` gives it its path."""

    def delete(self, path: str) -> None:
        """Delete a file durably; an absent file is no error.

        Raises:
            BusyError: The lock that the thread held was taken away; nothing was deleted.
        """

    def move(self, path: str, target: str) -> None:
        """Move a file to another path durably, without reading its bytes; replace a file there.

        Raises:
            BusyError: The lock that the thread held was taken away; nothing was moved.
        """

    def sync(self, folder: str) -> None:
        """Make the set of files below a folder durable, no matter which process changed it.

        A process that is killed before its fsync may leave a file that a power loss takes away, or
        a deleted file that a power loss brings back. Operations that rely on files of other
        processes call this first.
        """

    def lock(self, *, shared: bool, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of the store, together with other shared owners or alone.

        A thread may take the lock again while it holds it. If it asks for a shared lock then, it
        keeps the mode that it has. After the lock was taken away, writes and deletions raise
        :class:`BusyError` and do nothing. Error messages and lock listings show ``purpose``, the
        operation, such as ``save``.

        Raises:
            BusyError: Other owners held the lock for longer than the timeout.
        """

    def claim(self, kind: str, name: str) -> Claim:
        """Claim a named resource of a kind, such as ``timeline``, for this process.

        Raises:
            BusyError: Another process has the claim.
        """

    def locks(self) -> Sequence[Lock]:
        """Return all lock files, oldest first, including those of processes that still wait."""

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        """Remove the locks of owners that are dead or count as dead, or all; return them."""


def write_atomic(backend: Backend, path: str, data: bytes) -> None:
    """Write a complete small file atomically and durably."""
    with backend.writer() as writer:
        writer.write(data)
        writer.finalize(path)


def read_small_file(backend: Backend, path: str) -> bytes:
    """Return a complete file; :class:`CorruptedError` if it is larger than any small file."""
    if backend.size(path) > MAX_SMALL_FILE_BYTES:
        what = backend.describe(path)
        raise CorruptedError(f"{what} has more than {MAX_SMALL_FILE_BYTES} bytes", file=what)
    return backend.read(path)


def scan_by_size(backend: Backend, folder: str) -> dict[str, FileStat]:
    """Implement :meth:`Backend.scan` with one listing and one call per file, without versions."""
    found = {}
    for path in backend.list(folder):
        try:
            found[path] = FileStat(backend.size(path))
        except StorageError:
            # Another process may delete a file after the listing.
            if backend.exists(path):
                raise
    return found


def list_names(backend: Backend, folder: str) -> list[str]:
    """Return the names of the files ``NAME.json`` below a folder."""
    names = (path.removeprefix(f"{folder}/") for path in backend.list(folder))
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def file_sizes(backend: Backend, folder: str) -> dict[str, int]:
    """Return the sizes in bytes of all files below a folder, by path."""
    return {path: found.size for path, found in backend.scan(folder).items()}


def disk_bytes(backend: Backend) -> int:
    """Return the total size in bytes of all files, temporary ones included."""
    return sum(found.size for found in backend.scan("").values())


class translate_os_errors:  # noqa: N801  (it is used as a function)
    """Turn an ``OSError`` in a ``with`` block into a :class:`StoreError`.

    The error names the action and the path.
    """

    __slots__ = ("_action", "_path")

    def __init__(self, action: str, path: object) -> None:
        self._action, self._path = action, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpaceError(
                f"no space left to {self._action} {self._path}: make room on that disk, or run "
                "msft-store gc"
            ) from error
        reason = error.strerror or error
        raise StorageError(f"cannot {self._action} {self._path}: {reason}") from error


def _open_regular(path: str | Path, *, follow: bool) -> int:
    """Open a regular file only, because opening a pipe would block and a device may do anything."""
    if not stat.S_ISREG(os.stat(path, follow_symlinks=follow).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(path, flags if follow else flags | os.O_NOFOLLOW)


def read_file(path: str | Path, offset: int, length: int | None, *, follow: bool = True) -> bytes:
    """Return ``length`` bytes at ``offset`` of any file; ``None`` reads to its end.

    If ``follow`` is False, a symbolic link is refused.
    """
    with translate_os_errors("read", path):
        descriptor = _open_regular(path, follow=follow)
        try:
            parts = []
            if length is None:
                # Use the size of the open file, because another file may have its name by now.
                length = os.fstat(descriptor).st_size - offset
            while length > 0:
                part = os.pread(descriptor, min(length, _MOST_AT_ONCE), offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                length -= len(part)
        finally:
            os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_file_into(path: str | Path, offset: int, target: memoryview) -> int:
    """Fill ``target`` with the bytes at ``offset`` of any file; return the number of bytes read."""
    with translate_os_errors("read", path):
        descriptor, filled = _open_regular(path, follow=True), 0
        try:
            while filled < len(target):
                part = target[filled : filled + _MOST_AT_ONCE]
                got = os.preadv(descriptor, [part], offset + filled)
                if got == 0:
                    break
                filled += got
        finally:
            os.close(descriptor)
    return filled


_WRITE_BUFFER = 1 << 20
"""Bytes that are collected before they are written, so that threads seldom wait for a write."""


class _LocalWriter:
    def __init__(self, root: Path, folders: _Folders, confirm: Callable[[], None]) -> None:
        self.position = 0
        self._root = root
        self._folders = folders
        self._confirm = confirm
        self._path = root / TEMPORARY / f"{os.getpid()}-{uuid.uuid4().hex}"
        with translate_os_errors("create", self._path):
            make_unlinked_folder(self._path.parent)
            self._file = self._path.open("xb", buffering=_WRITE_BUFFER)

    def write(self, data: bytes | memoryview) -> None:
        with translate_os_errors(f"write {len(data)} more bytes to", self._path):
            self._file.write(data)
        self.position += len(data)

    def finalize(self, path: str) -> None:
        target = self._root / path
        with translate_os_errors(f"write the {self.position} bytes of", target):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._folders.make(target.parent)
            self._confirm()
            os.replace(self._path, target)
            _sync_folder(target.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


class _Folders:
    """Creates the folders of a store and makes each durable before a file in it is finalized."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable = {root}

    def make(self, folder: Path) -> None:
        if folder != self._root:
            self.make(folder.parent)
            refuse_link(folder)
        if folder not in self._durable or not folder.is_dir():
            make_folder(folder)
            self._durable.add(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably."""
    if not folder.is_dir():
        if not folder.parent.is_dir():
            make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
    # An existing folder is synced as well, because the process that created it may have been killed
    # before its fsync. Some writable folders cannot be opened for reading, and so not be synced.
    with contextlib.suppress(PermissionError):
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder durably; the target must be absent or an empty folder."""
    with translate_os_errors("write", target):
        os.replace(source, target)
        _sync_folder(target.absolute().parent)


class LocalBackend:
    """A store in a folder of a local file system."""

    def __init__(self, root: Path, *, lock_timeout: float | None = None) -> None:
        self.root = root
        self._prefix = f"{root}{os.sep}"
        self._folders = _Folders(root)
        self._lock_timeout = lock_timeout
        self._locks = Locks(root, timeout=lock_timeout)

    def __getstate__(self) -> tuple[Path, float | None]:
        return self.root, self._lock_timeout

    def __setstate__(self, state: tuple[Path, float | None]) -> None:
        root, lock_timeout = state
        LocalBackend.__init__(self, root, lock_timeout=lock_timeout)

    def make_root(self) -> None:
        """Create the folder itself."""
        with translate_os_errors("create", self.root):
            make_folder(self.root.absolute())

    def free_bytes(self) -> int | None:
        """Return the bytes that this user may still write; ``None`` if the system hides them."""
        with translate_os_errors("access", self.root):
            found = os.statvfs(self.root)
        # A file system keeps some of its free blocks for root; f_bavail does not count them.
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    def describe(self, path: str) -> str:
        return self._prefix + path

    def exists(self, path: str) -> bool:
        target = self.describe(path)
        with translate_os_errors("access", target):
            try:
                return not stat.S_ISDIR(os.lstat(target).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return read_file(self.describe(path), offset, length, follow=False)

    def size(self, path: str) -> int:
        target = self.describe(path)
        with translate_os_errors("read", target):
            return os.lstat(target).st_size

    def list(self, folder: str) -> list[str]:
        return sorted(path for path, _ in self._walk(folder))

    def scan(self, folder: str) -> dict[str, FileStat]:
        found = {}
        with translate_os_errors("list", self.describe(folder)):
            for path, entry in self._walk(folder):
                with contextlib.suppress(FileNotFoundError):
                    found[path] = _file_stat(entry.stat(follow_symlinks=False))
        return dict(sorted(found.items()))

    def _walk(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the path and the directory entry of each file below a folder."""
        top = self.describe(folder).rstrip(os.sep)
        with translate_os_errors("list", top):
            if folder:
                refuse_link(top)
            folders = [top]
            while folders:
                try:
                    entries = os.scandir(folders.pop())
                except FileNotFoundError:
                    continue
                with entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        else:
                            yield entry.path[len(self._prefix) :].replace(os.sep, "/"), entry

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        writer = _LocalWriter(self.root, self._folders, self._locks.confirm)
        try:
            yield writer
        finally:
            writer.discard()

    def delete(self, path: str) -> None:
        target = self.root / path
        with translate_os_errors("delete", target):
            self._locks.confirm()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            if target.parent.is_dir():
                _sync_folder(target.parent)

    def move(self, path: str, target: str) -> None:
        source, place = self.root / path, self.root / target
        with translate_os_errors(f"move {source} to", place):
            self._folders.make(place.parent)
            self._locks.confirm()
            os.replace(source, place)
            # Sync the new entry first, so that a power loss may leave two names but never none.
            _sync_folder(place.parent)
            _sync_folder(source.parent)

    def sync(self, folder: str) -> None:
        top = self.root / folder
        with translate_os_errors("sync", top):
            if not top.is_dir():
                return
            self._folders.make(top)
            for parent, _, _ in os.walk(top, onerror=_unless_absent):
                _sync_folder(Path(parent))

    def clear_temporary(self) -> None:
        """Delete all temporary files; no writer may be open."""
        with translate_os_errors("delete", self.root / TEMPORARY):
            shutil.rmtree(self.root / TEMPORARY)
            _sync_folder(self.root)

    @contextlib.contextmanager
    def lock(self, *, shared: bool, purpose: str) -> Iterator[None]:
        with translate_os_errors("lock", self.root):
            held = self._locks.acquire(shared=shared, purpose=purpose)
        try:
            yield
        finally:
            with translate_os_errors("unlock", self.root):
                held.release()

    def claim(self, kind: str, name: str) -> Claim:
        with translate_os_errors(f"claim {kind} {name!r} of", self.root):
            return acquire_claim(self.root, kind, name)

    def locks(self) -> Sequence[Lock]:
        with translate_os_errors("list the locks of", self.root):
            return self._locks.all()

    def unlock(self, *, force: bool) -> Sequence[Lock]:
        with translate_os_errors("unlock", self.root):
            return self._locks.unlock(force=force)


def _file_stat(status: os.stat_result) -> FileStat:
    # A third file may reuse the inode of the first. Their times differ, unless all were written
    # within one tick of the clock, so a file that is younger than a tick has no version.
    if time.time_ns() - status.st_ctime_ns < _CLOCK_TICK_NS:
        return FileStat(status.st_size)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return FileStat(status.st_size, (status.st_dev, status.st_ino, status.st_size, *times))


def _unless_absent(error: OSError) -> None:
    # A folder that cannot be listed must not count as empty, because gc would delete what it needs.
    if not isinstance(error, FileNotFoundError):
        raise error
