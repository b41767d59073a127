"""The promises of :class:`~msft_store.remote.transport.base.Remote`, as tests for pytest.

Set a test to ``None`` in the subclass if it does not apply.

Example::

    class TestMyRemote(RemoteContract):
        @pytest.fixture
        def remote(self):
            return MyRemote("address")
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from msft_store.errors import StorageError, StoreError
from msft_store.remote.api import clone, push
from msft_store.remote.transport.base import PART_BYTES, Remote, as_parts
from msft_store.store import Store, open_remote
from msft_store.testing.backends import FILES, FOLDERS, files_below
from msft_store.testing.expect import require, require_error, run_in_threads


class _InterruptedError(Exception):
    pass


class RemoteContract:
    """All promises of a remote. A subclass has a fixture ``remote`` that returns an empty one."""

    def put(self, remote: Remote, files: Mapping[str, bytes]) -> None:
        """Write files."""
        for path, data in files.items():
            remote.put(path, *as_parts(data))

    def test_describe_contains_the_path(self, remote: Remote) -> None:
        require("data/a" in remote.describe("data/a"), "describe contains the path")

    def test_sizes_has_all_files_below_a_folder(self, remote: Remote) -> None:
        require(remote.sizes("data") == {}, "sizes of an absent folder is empty")
        self.put(remote, FILES)
        for folder in FOLDERS:
            below = {path: len(data) for path, data in files_below(folder).items()}
            require(remote.sizes(folder) == below, f"sizes({folder!r}) is {below}")
        require(remote.sizes("").keys() >= FILES.keys(), "sizes('') has all files")
        for path, data in FILES.items():
            require(remote.size(path) == len(data), f"size of {path} is {len(data)}")

    def test_read_returns_any_range_or_raises(self, remote: Remote) -> None:
        self.put(remote, FILES)
        data = FILES["data/a"]
        for offset, length in ((0, 256), (3, 5), (255, 1)):
            found = remote.read("data/a", offset, length)
            require(
                found == data[offset:][:length], f"read from {offset} on returns {length} bytes"
            )
        require_error(StorageError, remote.read, "data/a", 250, 7)

    def test_an_absent_file_is_reported(self, remote: Remote) -> None:
        self.put(remote, FILES)
        for path in ("absent", "data/absent"):
            require(remote.size(path) is None, "size of an absent file is None")
            require(remote.read_versioned(path, 9) is None, "an absent file has no version")
            require_error(StorageError, remote.read, path, 0, 1)

    def test_read_versioned_returns_a_file_up_to_a_size(self, remote: Remote) -> None:
        self.put(remote, FILES)
        found = remote.read_versioned("data/a", 256)
        require(
            found is not None and found[0] == FILES["data/a"], "read_versioned returns all bytes"
        )
        require_error(StorageError, remote.read_versioned, "data/a", 255)

    def test_put_writes_a_file_of_any_size(self, remote: Remote) -> None:
        part = bytes(range(256)) * (PART_BYTES // 512)
        for parts in ([b"small"], [part, b"odd", part], []):
            data = b"".join(parts)
            remote.put("data/file", functools.partial(iter, parts), len(data))
            require(remote.size("data/file") == len(data), "put replaces a file")
            if data:
                require(remote.read("data/file", 0, len(data)) == data, "put writes all parts")

    def test_an_interrupted_put_changes_nothing(self, remote: Remote) -> None:
        def broken() -> Iterator[bytes]:
            yield bytes(PART_BYTES)
            raise _InterruptedError

        self.put(remote, {"data/old": b"old"})
        for path in ("data/old", "data/new"):
            for size in (PART_BYTES, 3 * PART_BYTES):
                require_error(Exception, remote.put, path, broken, size)
        require(remote.sizes("data") == {"data/old": 3}, "a file is visible when it is complete")
        require(remote.read("data/old", 0, 3) == b"old", "an interrupted put replaces nothing")

    def test_create_writes_a_new_file_only(self, remote: Remote) -> None:
        require(remote.create("data/file", b"one") is True, "create returns True if it wrote")
        require(remote.create("data/file", b"two") is False, "create returns False if it did not")
        require(remote.read("data/file", 0, 3) == b"one", "create replaces no file")

    def test_replace_needs_the_present_version(self, remote: Remote) -> None:
        remote.create("data/file", b"one")
        version = _version_of(remote, "data/file")
        require(remote.replace("data/file", b"two", version) is True, "replace of this version")
        require(
            remote.replace("data/file", b"six", version) is False, "no replace of an old version"
        )
        require(remote.replace("absent", b"six", version) is False, "no replace of an absent file")
        require(remote.read("data/file", 0, 3) == b"two", "a refused replace changes nothing")
        require(remote.size("absent") is None, "a refused replace writes nothing")

    def test_one_of_several_writers_wins(self, remote: Remote) -> None:
        created = run_in_threads(
            remote.workers, lambda number: remote.create("data/file", bytes([number]))
        )
        require(sorted(created)[-2:] in ([True], [False, True]), "one of several creates writes")
        version = _version_of(remote, "data/file")
        replaced = run_in_threads(
            remote.workers, lambda number: remote.replace("data/file", bytes([number]), version)
        )
        require(sorted(replaced)[-2:] in ([True], [False, True]), "one of several replaces writes")
        winner = bytes([replaced.index(True)])
        require(remote.read("data/file", 0, 1) == winner, "the file is the one that was written")

    def test_several_threads_use_it_at_once(self, remote: Remote) -> None:
        def work(number: int) -> bytes:
            self.put(remote, {f"data/{number}": bytes([number]) * 1000})
            return remote.read(f"data/{number}", 0, 1)

        expected = [bytes([number]) for number in range(remote.workers)]
        require(run_in_threads(remote.workers, work) == expected, "a thread reads what it wrote")
        require(len(remote.sizes("data")) == remote.workers, "the files of all threads are there")

    def test_every_failure_is_a_store_error(self, remote: Remote) -> None:
        self.put(remote, FILES)
        for path in ("data", "top/below"):
            for action in (
                lambda path: remote.read(path, 0, 1),
                lambda path: remote.read_versioned(path, 9),
                lambda path: self.put(remote, {path: b"new"}),
                remote.size,
                remote.sizes,
                remote.sync,
            ):
                # A medium without folders may allow what a file system refuses.
                with contextlib.suppress(StoreError):
                    action(path)
        require(remote.read("top", 0, 1) == FILES["top"], "a failure changes no other file")

    def test_a_store_is_pushed_read_in_place_and_cloned(
        self, remote: Remote, tmp_path: Path
    ) -> None:
        store = Store.create(tmp_path / "store")
        weights = {"w": torch.arange(1000)}
        store.pin(store.save(weights), "best")
        push(store, remote)
        require(push(store, remote).bytes == 0, "a second push sends nothing")
        clone(remote, tmp_path / "clone")
        for copy in (open_remote(remote), Store.open(tmp_path / "clone")):
            require(copy.refs() == store.refs(), "the refs are copied")
            require(torch.equal(copy.load("best")["w"], weights["w"]), "the data is exact")
            require(copy.check() == [], "the copy is undamaged")


def _version_of(remote: Remote, path: str) -> object:
    found = remote.read_versioned(path, 1 << 20)
    require(found is not None, f"read_versioned finds {path}")
    return found and found[1]
