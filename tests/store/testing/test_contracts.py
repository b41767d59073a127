"""Every backend and remote of the package keeps its promises, and so do those of the manual."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from msft_store.remote.backend import RemoteBackend, StagedBackend
from msft_store.remote.transport.base import Remote, as_parts
from msft_store.remote.transport.fsspec import fsspec_remote
from msft_store.remote.transport.url import connect_remote
from msft_store.storage.backend import Backend, LocalBackend
from msft_store.storage.overlay import Overlay
from msft_store.storage.quota import QuotaBackend
from msft_store.testing import BackendContract, FaultyBackend, ReadContract, RemoteContract
from msft_store.testing.backends import FILES
from tests.support.quota import QuotaBackend as SmallDisk
from tests.support.s3 import environment, serve_s3

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "howto" / "testing.md").read_text(encoding="utf-8")
BLOCKS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    if "\nclass " in block
]
MANUAL: dict[str, Any] = {"__name__": __name__}
exec("\n".join(BLOCKS), MANUAL)  # noqa: S102


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serve_s3() as address:
        yield address


class TestLocalBackend(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return LocalBackend(tmp_path)


class TestQuotaBackend(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return QuotaBackend(LocalBackend(tmp_path))


class TestSmallDisk(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return SmallDisk(tmp_path)


class TestFaultyBackend(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return FaultyBackend(LocalBackend(tmp_path))


class TestOverlay(ReadContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return Overlay(LocalBackend(tmp_path))

    def put(self, backend: Overlay, files: Mapping[str, bytes]) -> None:
        """Replace every second file."""
        for number, (path, data) in enumerate(files.items()):
            if number % 2:
                backend.replaced[path] = data
            else:
                super().put(backend._inner, {path: data})


class TestStagedFiles(ReadContract):
    places: Mapping[str, str] = {path: f"staged/{path}" for path in FILES if path != "top"}

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return StagedBackend(LocalBackend(tmp_path), {}, lambda path: f"origin/{path}")

    def put(self, backend: StagedBackend, files: Mapping[str, bytes]) -> None:
        """Stage all files but one."""
        super().put(
            backend._inner, {self.places.get(path, path): data for path, data in files.items()}
        )
        backend._places = self.places


class TestStoreInPlace(ReadContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return RemoteBackend(connect_remote(MemoryStore()))

    def put(self, backend: RemoteBackend, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            backend._remote.put(path, *as_parts(data))


class TestDirectory(RemoteContract):
    @pytest.fixture
    def remote(self, tmp_path: Path) -> Remote:
        return connect_remote(tmp_path / "remote")


class TestObjectStore(RemoteContract):
    @pytest.fixture
    def remote(self) -> Remote:
        return connect_remote(MemoryStore())


class TestFsspecMemory(RemoteContract):
    @pytest.fixture
    def remote(self) -> Remote:
        return fsspec_remote(f"memory://{uuid.uuid4().hex}/run")


class TestFsspecFiles(RemoteContract):
    @pytest.fixture
    def remote(self, tmp_path: Path) -> Remote:
        return fsspec_remote(f"local://{tmp_path / 'files'}")


class TestS3(RemoteContract):
    # The test server looks at the version and writes in two steps.
    test_one_of_several_writers_wins = None

    @pytest.fixture
    def remote(self, s3: str, monkeypatch: pytest.MonkeyPatch) -> Remote:
        for name, value in environment(s3).items():
            monkeypatch.setenv(name, value)
        return connect_remote(f"s3://bucket/{uuid.uuid4().hex}/run")


def test_the_remote_of_the_manual_fits_on_a_page() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line]) < 40


TestMemoryRemote = MANUAL["TestMemoryRemote"]
TestRecordingBackend = MANUAL["TestRecordingBackend"]


def test_the_package_does_without_its_tests_and_they_without_pytest() -> None:
    code = """
import sys, msft_store
assert msft_store.Store and "msft_store.testing" not in sys.modules
import msft_store.testing
assert "pytest" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
