"""Locks: the order of owners, the recovery of dead locks, and writes without a lock."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from msft_store import Base, BusyError, Checkpoint, InvalidInputError, StorageError, Store
from msft_store.cli.main import main
from msft_store.storage.backend import LocalBackend
from msft_store.storage.lock_files import EXPIRY_SECONDS, LOCKS, UNKNOWN, Process, process_status
from msft_store.storage.locks import TIMEOUT, Locks, next_step
from tests.support.owners import ELSEWHERE, here, plant, silence
from tests.support.states import State, same_bits, train_step


def hasty(store: Store) -> Store:
    """Return the same store with a lock timeout of zero."""
    return Store(LocalBackend(Path(store.path), lock_timeout=0.0))


def lock_files(store: Store) -> list[Path]:
    return sorted(Path(store.path, LOCKS).iterdir())


class Request(NamedTuple):
    """A request in the model: what it does next, and what it knows.

    A look takes several steps, for a listing need not be of one moment.
    """

    at: str = "place"
    placed: bool = False
    looked: int = 0
    """Number of requests that it has read."""
    first: int | None = None
    """The first request whose lock it saw and that conflicts."""


DONE = Request("done")


@pytest.mark.parametrize("modes", list(itertools.product(["shared", "exclusive"], repeat=3)))
def test_no_order_of_steps_leads_to_conflicts_or_starvation(
    modes: tuple[str, ...],
) -> None:
    start = tuple(Request() for _ in modes)
    before: dict[tuple[Request, ...], list[tuple[Request, ...]]] = {start: []}
    new = [start]
    while new:
        state = new.pop()
        owners = [m for request, m in zip(state, modes, strict=True) if request.at == "go"]
        assert "exclusive" not in owners or len(owners) == 1
        # Each of them may also be killed, and its lock recovered.
        killed = [(*state[:who], DONE, *state[who + 1 :]) for who in range(len(state))]
        after = list(successors(state, modes))
        new += {*after, *killed} - before.keys()
        before.update({one: [] for one in {*after, *killed} - before.keys()})
        for one in after:
            before[one].append(state)
    # From every state, the requests can finish without a kill.
    end = tuple(DONE for _ in modes)
    ended, new = {end}, [end]
    while new:
        more = set(before[new.pop()]) - ended
        ended |= more
        new += more
    assert ended == before.keys()


def successors(state: tuple[Request, ...], modes: tuple[str, ...]) -> Iterator[tuple[Request, ...]]:
    """Yield the states after one more step of one request."""
    for who, request in enumerate(state):
        after = {"place": Request("look", placed=True), "withdraw": Request("look"), "go": DONE}
        if request.at in after:
            step = after[request.at]
        elif request.at == "done":
            continue
        elif request.looked < len(state):
            other, first = request.looked, request.first
            conflict = other != who and "exclusive" in (modes[who], modes[other])
            if conflict and state[other].placed and first is None:
                first = other
            step = Request("look", request.placed, other + 1, first)
        else:
            conflicts = [] if request.first is None else [(request.first, "")]
            todo = next_step((who, ""), request.placed, conflicts)
            step = Request("look" if todo == "wait" else todo, request.placed)
        yield (*state[:who], step, *state[who + 1 :])


def elsewhere(action: Callable[[], object]) -> None:
    """Run a function in another thread, which has no lock."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


def test_a_lock_is_an_empty_file_that_names_its_owner(store: Store) -> None:
    with store.protecting("a commit"):
        (path,) = lock_files(store)
        assert path.stat().st_size == 0
        (lock,) = store.locks()
        assert (lock.pid, lock.owner, lock.shared) == (os.getpid(), "alive", True)
        assert 0 <= lock.silent_seconds < 60
        assert f"a-commit by process {os.getpid()} on " in str(lock)
    assert store.locks() == []
    assert lock_files(store) == []


def test_locks_do_not_count_as_the_stores_bytes(store: Store, ckpt: Checkpoint) -> None:
    before = store.stats()
    with store.protecting("commit"):
        assert store.stats() == before
    assert store.stats() == before
    assert store.check() == []


def test_a_thread_may_take_its_lock_again_but_not_upgrade_it(store: Store) -> None:
    locks = Locks(Path(store.path), timeout=0.0)
    outer = locks.acquire(shared=True, purpose="commit")
    assert locks.acquire(shared=True, purpose="save") is outer
    with pytest.raises(BusyError, match=r"gc needs .* alone, but the same thread .* for commit"):
        locks.acquire(shared=False, purpose="gc")
    outer.release()
    assert len(lock_files(store)) == 1
    outer.release()
    assert lock_files(store) == []
    alone = locks.acquire(shared=False, purpose="gc")
    assert locks.acquire(shared=True, purpose="pin") is alone
    alone.release()
    with pytest.raises(BusyError):
        elsewhere(lambda: locks.acquire(shared=True, purpose="save"))
    alone.release()
    assert lock_files(store) == []


def test_stores_of_one_path_in_one_thread_share_a_lock(
    tmp_path: Path, store: Store, ckpt: Checkpoint
) -> None:
    (tmp_path / "link").symlink_to(store.path)
    again = Store.open(tmp_path / "link")
    with store.protecting("a commit"):
        again.pin(ckpt, "kept")
        assert len(store.locks()) == 1
        with pytest.raises(BusyError, match="the same thread holds its lock for a commit"):
            again.plan_gc().execute()
    again.plan_gc().execute()
    assert store.refs() == {"kept": ckpt.id}


def test_a_disk_that_fails_is_not_taken_for_a_lock_that_was_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = Locks(Path(store.path), timeout=0.0)
    held = locks.acquire(shared=True, purpose="save")

    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        with pytest.raises(OSError, match="Input/output error"):
            locks.confirm()
    locks.confirm()
    held.release()


def test_a_save_in_a_commit_does_not_queue_behind_a_gc_that_waits_for_the_commit(
    store: Store, base: Base, state: State
) -> None:
    mine = hasty(store)
    with mine.protecting("commit"):
        gc = plant(store, here())
        with pytest.raises(BusyError, match=r"save waited 0 s .* gc by process"):
            elsewhere(lambda: hasty(store).save(state, parent=base))
        ckpt = mine.save(state, parent=base)
        mine.pin(ckpt, "kept")
    with pytest.raises(BusyError, match="pin waited"):
        mine.pin(ckpt, "kept")
    gc.unlink()
    assert same_bits(store.load("kept"), state)


@pytest.mark.parametrize("shared", [True, False])
def test_the_older_request_keeps_its_file_and_the_younger_withdraws(
    store: Store, shared: bool
) -> None:
    others = plant(store, here(), later=3600)
    folder, seen = others.parent, []

    def ask() -> None:
        locks = Locks(Path(store.path))
        seen.append(locks.acquire(shared=shared, purpose="asked"))

    asking = threading.Thread(target=ask)
    asking.start()
    while not list(folder.glob("*_asked_*")):
        assert asking.is_alive()
    before = plant(store, here(), later=-3600)
    while list(folder.glob("*_asked_*")):
        assert asking.is_alive()
    before.unlink()
    while not list(folder.glob("*_asked_*")):
        assert asking.is_alive()
    # It is placed again if another process removes it.
    next(folder.glob("*_asked_*")).unlink()
    while not list(folder.glob("*_asked_*")):
        assert asking.is_alive()
    others.unlink()
    asking.join()
    seen[0].release()
    assert lock_files(store) == []


def test_a_forked_child_has_no_lock_and_removes_none(store: Store, ckpt: Checkpoint) -> None:
    with store.protecting("commit"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with store.protecting("commit"):
                    code = len(store.locks())
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        held = store.protecting("commit")
        held.__enter__()
        child = os.fork()
        if child == 0:
            held.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert len(lock_files(store)) == 1
        held.__exit__(None, None, None)
        with pytest.raises(BusyError, match="forget waited"):
            elsewhere(lambda: hasty(store).forget(ckpt))
    hasty(store).forget(ckpt)


def test_a_disk_without_room_for_a_byte_has_room_for_a_lock(
    store: Store, ckpt: Checkpoint, base: Base, state: State
) -> None:
    lost = store.save(train_step(state, 0.9, 5), parent=base)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            store.forget(lost)
            code = 0 if store.plan_gc().execute().freed_bytes > 0 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [c.id for c in store.log()] == [ckpt.id]


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_lock_of_a_killed_process_blocks_no_other(
    store: Store, ckpt: Checkpoint, shared: bool, reaped: bool
) -> None:
    child = os.fork()
    if child == 0:
        Locks(Path(store.path)).acquire(shared=shared, purpose="save")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if reaped:
        os.waitpid(child, 0)
    (lock,) = store.locks()
    assert (lock.pid, lock.owner) == (child, "dead")
    assert store.check() == []
    hasty(store).forget(ckpt)
    assert lock_files(store) == []
    if not reaped:
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "owner",
    [here(start=1), here(boot="123"), here(boot="123", namespace="456")],
    ids=["its number was given to another process", "another boot", "a container of another boot"],
)
def test_an_owner_that_cannot_live_any_more_is_dead(
    store: Store, ckpt: Checkpoint, owner: Process
) -> None:
    plant(store, owner)
    # These tests may run in a container, where a machine cannot be identified.
    expected = "dead" if owner.boot == here().boot or here().machine != UNKNOWN else "elsewhere"
    assert [lock.owner for lock in store.locks()] == [expected]
    assert process_status(owner, here()) == expected
    assert store.unlock(force=expected != "dead")[0].owner == expected
    hasty(store).forget(ckpt)


@pytest.mark.parametrize(
    "owner",
    [
        here(namespace="123"),
        here(boot=UNKNOWN),
        here(namespace=UNKNOWN, start=1),
        here(boot="123", machine="456"),
        here(boot="123", machine=UNKNOWN),
        ELSEWHERE,
    ],
)
def test_an_owner_elsewhere_counts_as_alive_until_it_expires(
    store: Store, ckpt: Checkpoint, base: Base, state: State, owner: Process
) -> None:
    lock = plant(store, owner, purpose="a gc")
    with pytest.raises(BusyError, match=r"a-gc by process \d+ on .*elsewhere.* unlock --force"):
        hasty(store).save(state, parent=base)
    assert store.unlock() == []
    silence(lock)
    assert [lock.owner for lock in store.locks()] == ["silent"]
    hasty(store).save(state, parent=base)
    assert lock_files(store) == []
    assert same_bits(store.load(ckpt), train_step(state, 0.05, 1))


def test_a_lock_dated_in_the_future_says_so_and_expires_by_waiting(
    store: Store, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, patient = plant(store, ELSEWHERE), hasty(store)
    future = os.stat(lock).st_mtime + 3600
    os.utime(lock, (future, future))
    says = r"(3600|3599) s in the future, so a clock was wrong; it expires after 300 s of waiting"
    with pytest.raises(BusyError, match=says):
        patient.forget(ckpt)
    assert store.unlock() == []
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + EXPIRY_SECONDS + 1)
    # An owner that lives gives a sign, which begins the waiting again.
    os.utime(lock, (future + 30, future + 30))
    with pytest.raises(BusyError):
        patient.forget(ckpt)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 2 * EXPIRY_SECONDS + 2)
    with pytest.raises(BusyError):
        hasty(store).forget(ckpt)
    patient.forget(ckpt)
    assert lock_files(store) == []


def test_processes_without_readable_identity_are_elsewhere() -> None:
    hidden = here(boot=UNKNOWN, namespace=UNKNOWN, machine=UNKNOWN, start=0)
    assert process_status(hidden, hidden) == "elsewhere"
    assert process_status(here(start=0), here()) == "alive"
    assert process_status(here(pid=1, start=0), here()) == "alive"


def test_unlock_removes_dead_locks_and_with_force_all(store: Store, ckpt: Checkpoint) -> None:
    dead = plant(store, here(start=1), shared=True)
    silent = plant(store, ELSEWHERE, shared=True)
    silence(silent)
    live = [plant(store, ELSEWHERE), plant(store, here())]
    assert {lock.name for lock in store.unlock()} == {dead.name, silent.name}
    assert {lock.name for lock in store.locks()} == {path.name for path in live}
    with pytest.raises(BusyError, match=r"gc by process 1234 on .*; gc by process"):
        hasty(store).forget(ckpt)
    assert {lock.name for lock in store.unlock(force=True)} == {path.name for path in live}
    hasty(store).forget(ckpt)


def test_a_lock_of_an_unknown_form_is_respected(store: Store, ckpt: Checkpoint) -> None:
    path = Path(store.path, LOCKS, "v9 of somebody")
    path.touch()
    path.with_name(".hidden").touch()
    with pytest.raises(BusyError, match="something by process 0 on unknown"):
        hasty(store).forget(ckpt)
    silence(path)
    hasty(store).forget(ckpt)
    assert [p.name for p in lock_files(store)] == [".hidden"]


def test_an_owner_without_its_lock_finalizes_nothing(
    store: Store, base: Base, state: State
) -> None:
    other = Store.open(store.path)
    with store.protecting("commit"):
        (lost,) = other.unlock(force=True)
        assert lost.purpose == "commit"
        with pytest.raises(BusyError, match=r"was taken away from commit.* start it again"):
            store.save(train_step(state, 0.1, 1), parent=base)
        with pytest.raises(BusyError, match="was taken away"):
            store.add_base(base.path)
    assert store.log() == []
    assert store.check() == []
    assert store.plan_gc().freed_bytes == 0
    store.save(train_step(state, 0.1, 1), parent=base)


def test_the_environment_sets_the_lock_timeout(
    store: Store, ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMEOUT, "0.01")
    late = pytest.raises(BusyError, match=r"forget waited 0\.01 s .* save by process")
    with LocalBackend(Path(store.path)).lock(shared=True, purpose="save"), late:
        elsewhere(lambda: store.forget(ckpt))
    for wrong in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv(TIMEOUT, wrong)
        with pytest.raises(InvalidInputError, match=f"{TIMEOUT} is a number of seconds"):
            store.forget(ckpt)
    monkeypatch.setenv(TIMEOUT, "")
    store.forget(ckpt)


def test_a_store_where_no_lock_can_be_written_is_read_only(
    store: Store, ckpt: Checkpoint, state: State
) -> None:
    folder = Path(store.path, LOCKS)
    folder.rmdir()
    folder.write_text("in the way")
    assert same_bits(store.load(ckpt), train_step(state, 0.05, 1))
    assert store.check() == []
    with pytest.raises(StorageError, match="cannot lock"):
        store.save(state)


def test_the_command_removes_locks_and_lists_the_others(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--store", store.path, "unlock"]
    assert main(command) == 0
    assert capsys.readouterr().out == "no locks\n"
    plant(store, here(start=1), purpose="save")
    plant(store, ELSEWHERE)
    assert main(command) == 0
    removed, stays = capsys.readouterr().out.splitlines()
    assert removed.startswith(f"removed  save by process {os.getpid()} on ")
    assert stays.startswith("stays    gc by process 1234 on ")
    assert main([*command, "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["locks"] == []
    (lock,) = document["removed"]
    assert (lock["pid"], lock["owner"], lock["shared"]) == (1234, "elsewhere", False)
