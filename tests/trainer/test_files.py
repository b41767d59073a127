"""Atomic writes."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trainer.errors import RunError
from trainer.files import enough_space, write_atomic


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    write_atomic(path, b"one")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"no space left on the disk .*a\.txt: it needs 3 bytes and"):
        write_atomic(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_deleted_and_what_a_live_one_writes_is_not(
    tmp_path: Path,
) -> None:
    dead, live, other = (tmp_path / f".{name}.tmp" for name in ("a.txt.1", "a.txt.2", "b.txt.1"))
    for path in (dead, live, other):
        path.write_bytes(b"part")
    with live.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(tmp_path / "a.txt", b"one")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", live.name, other.name}


def test_every_error_of_a_full_disk_states_the_missing_bytes(tmp_path: Path) -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(RunError, match=r"the model .*: it needs 5,000 bytes and [\d,]+ are free"),
        enough_space("the model", tmp_path / "model", needed_bytes=5000),
    ):
        raise SafetensorError(words)
    with (
        pytest.raises(SafetensorError, match="header"),
        enough_space("the model", tmp_path / "model", needed_bytes=5000),
    ):
        raise SafetensorError("invalid header")
