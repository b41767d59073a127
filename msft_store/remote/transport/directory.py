"""A store in another directory as a remote. Its lock is taken, and all writes are durable.

Example::

    remote = DirectoryRemote(Path("/mnt/nas/run"))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msft_store.errors import StorageError
from msft_store.objects.manifest import manifest_path
from msft_store.objects.refs import REFS, parse_ref
from msft_store.remote.transport.base import PartReader, check_length
from msft_store.storage.backend import LocalBackend, file_sizes, write_atomic


class DirectoryRemote:
    """A directory in a file system of this machine."""

    workers = 1

    def __init__(self, root: Path) -> None:
        self.backend = LocalBackend(root)

    def describe(self, path: str) -> str:
        return self.backend.describe(path)

    @contextlib.contextmanager
    def session(self, purpose: str) -> Iterator[None]:
        self.backend.make_root()
        with self.backend.lock(shared=True, purpose=purpose):
            yield

    def sizes(self, folder: str) -> dict[str, int]:
        return file_sizes(self.backend, folder)

    def size(self, path: str) -> int | None:
        return self.backend.size(path) if self.backend.exists(path) else None

    def read(self, path: str, offset: int, length: int) -> bytes:
        data = self.backend.read(path, offset, length)
        return check_length(data, length, self.describe(path))

    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        size = self.size(path)
        if size is None:
            return None
        if size > most:
            raise StorageError(f"{self.describe(path)} has more than {most} bytes")
        data = self.backend.read(path)
        return data, data

    def put(self, path: str, parts: PartReader, size: int) -> None:
        self.backend.make_root()
        with self.backend.writer() as writer:
            for part in parts():
                writer.write(part)
            writer.finalize(path)

    def create(self, path: str, data: bytes) -> bool:
        return self.replace(path, data, None)

    def replace(self, path: str, data: bytes, version: Any) -> bool:
        self.backend.make_root()
        # The exclusive lock keeps other processes from pinning meanwhile.
        with self.backend.lock(shared=False, purpose="push"):
            if (self.backend.read(path) if self.backend.exists(path) else None) != version:
                return False
            if path.startswith(f"{REFS}/"):
                target = parse_ref(data, path, self.describe(path)).checkpoint
                if not self.backend.exists(manifest_path(target)):
                    raise StorageError(
                        f"checkpoint {target[:12]} was deleted at {self.describe('')} "
                        "before the ref to it was written; push again"
                    )
            write_atomic(self.backend, path, data)
            return True

    def sync(self, folder: str) -> None:
        self.backend.sync(folder)
