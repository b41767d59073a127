"""One process at a time uses the name of a timeline."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from msft_store import Base, BusyError, KeepBest, KeepLast, StorageError, Store, Timeline
from tests.support.children import begin, end_of


def opened(store: Store, name: str = "main") -> Timeline:
    return Timeline(Store.open(store.path), None, retention=KeepLast(1), name=name)


class Other:
    """A process that started before this one claimed a timeline, and runs commands."""

    def __init__(self, store: Store) -> None:
        commands, self._commands = os.pipe()
        self._answers, answer = os.pipe()

        def work() -> int:
            os.close(self._commands)
            lines: dict[str, Timeline] = {}
            while word := os.read(commands, 100).decode():
                os.write(answer, (self._do(store, lines, word) or "done").encode())
            return 0

        self.process = begin(work)
        os.close(commands)
        os.close(answer)

    def does(self, word: str) -> str:
        os.write(self._commands, word.encode())
        return os.read(self._answers, 10_000).decode()

    def end(self) -> None:
        os.close(self._commands)
        os.close(self._answers)
        assert end_of(self.process) in (0, -signal.SIGKILL)

    @staticmethod
    def _do(store: Store, lines: dict[str, Timeline], word: str) -> str:
        try:
            if word == "open":
                lines["main"] = opened(store)
            elif word == "close":
                lines.pop("main").close()
            elif word == "forget":
                del lines["main"]
            elif word == "fail inside":
                try:
                    with lines.pop("main"):
                        raise RuntimeError
                except RuntimeError:
                    pass
            elif word == "fail to open":
                Timeline(store, "nothing", retention=KeepLast(1))  # type: ignore[arg-type]
        except BusyError as error:
            return str(error)
        except Exception as error:
            return type(error).__name__
        return ""


@pytest.fixture
def other(store: Store) -> Iterator[Other]:
    process = Other(store)
    yield process
    process.end()


def test_a_second_process_is_refused_with_the_name_of_the_owner(store: Store, other: Other) -> None:
    assert other.does("open") == "done"
    with pytest.raises(BusyError) as caught:
        opened(store)
    for part in ("'main'", store.path, str(other.process), socket.gethostname(), "another name"):
        assert part in str(caught.value)
    opened(store, "another").close()


def test_two_processes_do_not_evict_each_others_best(store: Store, other: Other) -> None:
    line = Timeline(store, None, retention=KeepBest("val", mode="min"))
    ckpt = line.commit({"w": torch.ones(3)}, 1, {"val": 0.9})
    assert f"process {os.getpid()}" in other.does("open")
    assert torch.equal(line.rollback(ckpt)["w"], torch.ones(3))


def test_a_claim_is_free_as_soon_as_its_process_was_killed(store: Store, other: Other) -> None:
    other.does("open")
    os.kill(other.process, signal.SIGKILL)
    os.waitid(os.P_PID, other.process, os.WEXITED | os.WNOWAIT)
    assert store.check() == []
    assert store.plan_gc().leftovers == ()
    opened(store).close()


@pytest.mark.parametrize("word", ["close", "forget", "fail inside"])
def test_a_claim_is_free_once_its_user_has_left_it(store: Store, other: Other, word: str) -> None:
    other.does("open")
    assert other.does(word) == "done"
    opened(store).close()
    assert list(Path(store.path, "locks").iterdir()) == []


def test_a_timeline_that_could_not_begin_has_no_claim(store: Store, other: Other) -> None:
    assert other.does("fail to open") not in ("", "done")
    opened(store).close()


def test_a_timeline_can_be_opened_again_in_one_process(store: Store, other: Other) -> None:
    first = opened(store)
    second = opened(store)
    del first
    assert "is in use" in other.does("open")
    third = opened(store)
    third.close()
    assert other.does("open") == "done"
    assert other.does("close") == "done"
    del second


def test_a_forked_child_may_use_its_parents_timeline(store: Store, other: Other) -> None:
    line = opened(store)

    def work() -> int:
        mine = opened(store)
        mine.commit({"w": torch.ones(3)}, 1)
        del mine
        return 0

    assert end_of(begin(lambda: end_of(begin(work)))) == 0
    assert "is in use" in other.does("open")
    line.close()
    assert other.does("open") == "done"


def test_a_forked_child_is_refused_if_another_process_has_the_claim(
    store: Store, other: Other
) -> None:
    line = opened(store)
    line.close()
    other.does("open")

    def work() -> int:
        with pytest.raises(BusyError, match=f"process {other.process} on"):
            opened(store)
        return 0

    assert end_of(begin(work)) == 0


def test_a_new_store_at_the_same_path_has_its_own_claims(store: Store, other: Other) -> None:
    line = opened(store)
    Path(store.path, "locks", ".timeline-main").unlink()
    again = opened(store)
    assert "is in use" in other.does("open")
    del line
    assert "is in use" in other.does("open")
    again.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_claims_succeed_on_a_file_system_without_locks(
    store: Store, base: Base, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "lockf", fail)
    line = Timeline(store, base, retention=KeepLast(1))
    line.commit({"w": torch.ones(3)}, 1)
    line.close()


def _link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def _pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, outside: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [_link, _pipe, _folder])
def test_only_regular_files_are_opened(
    store: Store, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    Path(store.path, "locks").mkdir(exist_ok=True)
    plant(Path(store.path, "locks", ".timeline-main"), outside)
    with pytest.raises(StorageError, match="claim timeline 'main'"):
        opened(store)
    assert not outside.exists()
