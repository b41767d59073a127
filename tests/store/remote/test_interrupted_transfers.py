"""Interrupt transfers at every operation: readers see complete files, and a repetition resumes."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from obstore.store import MemoryStore

from msft_store import Base, NotAStoreError, StorageError, Store
from msft_store.integrations.remote import clone, open_remote, pull, push
from msft_store.remote.transport.base import ConnectionLostError, RetryingRemote
from msft_store.remote.transport.url import connect_remote
from msft_store.testing import SimulatedKill
from tests.support.remotes import FaultyRemote
from tests.support.s3 import environment, serve_s3
from tests.support.states import State, make_state, same_bits, train_step

States = dict[str, State]
Operation = Callable[[Store, FaultyRemote, Path], object]


@pytest.fixture
def states(store: Store, base: Base, state: State) -> States:
    """Return the states of two checkpoints by the names of their refs."""
    found = {"one": train_step(state, 0.05, 1), "two": train_step(state, 0.05, 2)}
    store.pin(store.save(found["one"], parent=base, step=1), "one")
    store.pin(store.save(found["two"], parent="one", step=2), "two")
    return found


def assert_holds(store: Store, states: States) -> None:
    assert store.check() == []
    assert set(store.refs()) == set(states)
    for name, state in states.items():
        assert same_bits(store.load(name), state)


def assert_complete(store: Store, states: States) -> None:
    """Assert that every visible checkpoint and ref is complete."""
    assert store.check() == []
    for checkpoint in store.log():
        assert same_bits(store.load(checkpoint), states["one" if checkpoint.step == 1 else "two"])


def count_operations(move: Callable[[FaultyRemote], object], inner: Callable[[], Any]) -> int:
    """Return the number of operations of a complete transfer."""
    remote = FaultyRemote(inner())
    move(remote)
    return remote.count


@pytest.mark.parametrize("error", [StorageError, SimulatedKill])
def test_a_push_that_is_cut_at_any_moment_can_be_resumed(
    store: Store, states: States, error: type[BaseException]
) -> None:
    count = count_operations(
        lambda remote: push(store, remote, with_base=True), lambda: connect_remote(MemoryStore())
    )
    assert count > 15
    for moment in range(count):
        memory = connect_remote(MemoryStore())
        remote = FaultyRemote(memory, error=error)
        remote.fail_at = moment
        with pytest.raises(error):
            push(store, remote, with_base=True)
        with contextlib.suppress(NotAStoreError):
            assert_complete(open_remote(memory), states)
        push(store, remote, with_base=True)
        assert_holds(open_remote(memory), states)
        assert len(remote.put_paths) == len(set(remote.put_paths)), "a file was sent twice"
        assert push(store, remote, with_base=True).bytes == 0


@pytest.mark.parametrize("error", [StorageError, SimulatedKill])
def test_a_clone_that_is_cut_at_any_moment_can_be_resumed(
    store: Store, states: States, tmp_path: Path, error: type[BaseException]
) -> None:
    memory = connect_remote(MemoryStore())
    push(store, memory, with_base=True)
    Path(store.bases()[0].path).unlink()
    whole = clone(memory, tmp_path / "whole", with_base=True)
    count = count_operations(
        lambda remote: clone(remote, tmp_path / "counted", with_base=True), lambda: memory
    )
    cut = 0
    for moment in range(count):
        target = tmp_path / f"clone-{moment}"
        remote = FaultyRemote(memory, error=error)
        remote.fail_at = moment
        try:
            clone(remote, target, with_base=True)
        except error:
            cut += 1
        else:
            # A range whose prefetch failed is read again when it is needed.
            assert_holds(Store.open(target), states)
            continue
        if (target / "store.json").exists():
            assert_complete(Store.open(target), states)
        done = clone(remote, target, with_base=True)
        copy = Store.open(target)
        assert_holds(copy, states)
        assert copy.plan_gc().leftovers == ()
        assert done.packs <= whole.packs
        with pytest.raises(NotAStoreError, match="already"):
            clone(remote, target, with_base=True)
    assert cut > 10


def test_a_pull_that_is_cut_at_any_moment_can_be_resumed_and_fetches_nothing_twice(
    store: Store, states: States, tmp_path: Path
) -> None:
    memory = connect_remote(MemoryStore())
    push(store, memory)
    whole = pull(Store.create(tmp_path / "whole"), memory)
    count = count_operations(
        lambda remote: pull(Store.create(tmp_path / "counted"), remote), lambda: memory
    )
    cut = 0
    for moment in range(count):
        target = Store.create(tmp_path / f"pull-{moment}")
        remote = FaultyRemote(memory)
        remote.fail_at = moment
        # A range whose prefetch failed is read again when it is needed.
        with contextlib.suppress(StorageError):
            pull(target, remote)
        assert_complete(target, states)
        root = tmp_path / f"pull-{moment}"
        here = {path.name for path in root.rglob("*.pack")}
        cut += bool(here) and not target.log()
        assert pull(target, remote).packs == whole.packs - len(here)
        assert_holds(target, states)
    assert cut > 0


@pytest.mark.parametrize("lost", [1, 2])
def test_a_connection_that_breaks_is_tried_again(
    store: Store, states: States, tmp_path: Path, lost: int
) -> None:
    """Assert that a transfer survives operations that fail a given number of times first."""
    faulty = FaultyRemote(connect_remote(MemoryStore()))
    failed: dict[tuple[str, str], int] = {}

    def before(kind: str, path: str) -> None:
        failed[kind, path] = failed.get((kind, path), 0) + 1
        if failed[kind, path] <= (lost if kind not in ("created", "replaced") else 1):
            raise ConnectionLostError(f"cannot {kind} {path}")

    faulty.before = before
    remote = RetryingRemote(faulty, delay=0)
    push(store, remote, with_base=True)
    # Replies to conditional writes were lost after the writes had succeeded.
    assert any(kind == "created" for kind, _ in failed)
    clone(remote, tmp_path / "clone", with_base=True)
    assert_holds(Store.open(tmp_path / "clone"), states)
    failed.clear()
    store.pin("two", "one")
    assert [move.name for move in push(store, remote).refs] == ["one"]


def test_a_connection_that_stays_broken_is_reported(store: Store, states: States) -> None:
    faulty = FaultyRemote(connect_remote(MemoryStore()))

    def before(kind: str, path: str) -> None:
        raise ConnectionLostError(f"cannot {kind} {path}")

    faulty.before = before
    with pytest.raises(StorageError, match=r"cannot size store\.json"):
        push(store, RetryingRemote(faulty, delay=0))


class Proxy:
    """A TCP proxy that cuts two of three connections after a number of bytes of the reply."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.cut_after: int | None = None
        self.cuts = 0
        self._target = target
        self._number = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._number += 1
                limit = self.cut_after if self._number % 3 else None
                server = socket.create_connection(self._target)
                pairs = ((client, server, limit), (server, client, limit))
                for pair in pairs:
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                if limit is not None and passed + len(data) > limit:
                    sink.sendall(data[: limit - passed])
                    self.cuts += 1
                    break
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Return a proxy in front of a real S3 server."""
    with serve_s3() as address:
        parts = urlsplit(address)
        proxy = Proxy((str(parts.hostname), parts.port or 0))
        for name, value in environment(f"http://127.0.0.1:{proxy.port}").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        yield proxy
        proxy.close()


@pytest.mark.parametrize("cut_after", [300, 5000])
def test_cuts_of_a_real_connection_lose_nothing(
    proxy: Proxy, cut_after: int, tmp_path: Path
) -> None:
    store, state = Store.create(tmp_path / "store"), make_state(1)
    states = {"one": state, "two": train_step(state, 0.05, 2)}
    store.pin(store.save(states["one"], step=1), "one")
    store.pin(store.save(states["two"], step=2), "two")
    proxy.cut_after = cut_after
    url = f"s3://bucket/{uuid.uuid4().hex}"
    for _ in range(20):
        with contextlib.suppress(StorageError):
            push(store, url)
            break
    sent = proxy.cuts
    assert sent > 0
    for _ in range(20):
        with contextlib.suppress(StorageError):
            clone(url, tmp_path / "clone")
            break
    assert proxy.cuts > sent
    proxy.cut_after = None
    assert push(store, url).bytes == 0
    assert_holds(Store.open(tmp_path / "clone"), states)
    assert_holds(open_remote(url), states)
