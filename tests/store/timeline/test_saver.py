"""Saves in the background: the caller waits for a copy, and everything else is as without them."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from msft_store import (
    AsyncSaver,
    Base,
    Checkpoint,
    InvalidInputError,
    KeepBest,
    KeepLast,
    StorageError,
    Store,
    Timeline,
)
from msft_store.storage.backend import LocalBackend, Writer
from msft_store.testing import WRITE_OPERATIONS, FaultyBackend, SimulatedKill
from tests.support.states import State, make_state, same_bits, train_step, write_base

LONG = 60.0
"""Seconds after which a test that hangs fails."""


class GatedBackend(LocalBackend):
    """Writes nothing while its gate is shut."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    def shut(self) -> None:
        self.gate.clear()
        self.reached.clear()

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        self.reached.set()
        if not self.gate.wait(LONG):
            raise StorageError("the gate stayed shut")
        with super().writer() as writer:
            yield writer


class WatchedStore(Store):
    """Notes where the tensors that it is given lie in memory."""

    def __init__(self, path: str) -> None:
        super().__init__(LocalBackend(Path(path)))
        self.places: list[dict[str, int]] = []

    def save(self, tensors: Any, **keywords: Any) -> Checkpoint:
        self.places.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return super().save(tensors, **keywords)


@pytest.fixture
def gated(store: Store, base: Base) -> Iterator[tuple[Store, GatedBackend]]:
    backend = GatedBackend(Path(store.path))
    yield Store(backend), backend
    backend.gate.set()


def twin(tmp_path: Path, state: State) -> tuple[Store, Base]:
    """Return another store with the same base."""
    store = Store.create(tmp_path / "twin")
    return store, store.add_base(write_base(tmp_path / "twin.safetensors", state))


def faulty(store: Store, error: type[BaseException] = StorageError) -> tuple[Store, FaultyBackend]:
    backend = FaultyBackend(LocalBackend(Path(store.path)), error=error, kinds=WRITE_OPERATIONS)
    return Store(backend), backend


def awkward_state() -> State:
    """Return tensors of every kind of layout, some of them tied."""
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn((6, 8), generator=generator)
    pairs = torch.randn((6, 8), generator=generator, dtype=torch.complex64)
    shared = torch.nn.Parameter(torch.randn(5, generator=generator))
    return {
        "plain": plain,
        "transposed": plain.T,
        "every other": plain[::2, 1::2],
        "expanded": plain[0].expand(3, 8),
        "conjugated": pairs.conj(),
        "negated": pairs.conj().imag,
        "nan payloads": torch.arange(1 << 16, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16),
        "nan payloads, columns": torch.arange(1 << 16, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.float16)
        .reshape(256, 256)
        .T,
        "number": torch.tensor(3),
        "empty": torch.empty((0, 2)),
        "flags": plain > 0,
        "tied": shared,
        "tied too": shared,
        "another view": shared[:3],
    }


def test_the_caller_continues_and_no_checkpoint_is_visible_before_it_is_durable(
    gated: tuple[Store, GatedBackend], base: Base, state: State
) -> None:
    store, backend = gated
    moved = train_step(state, 0.1, 1)
    backend.shut()
    with AsyncSaver(store) as saver:
        future = saver.save(moved, parent=base, step=3)
        assert backend.reached.wait(LONG)
        assert not future.done()
        assert not future.cancel()
        assert Store.open(store.path).log() == []
        with pytest.raises(TimeoutError):
            future.result(timeout=0)
        backend.gate.set()
        ckpt = future.result()
    assert Store.open(store.path).log() == [ckpt]
    assert same_bits(store.load(ckpt), moved)
    assert store.check() == []


def test_the_values_at_the_call_are_saved(gated: tuple[Store, GatedBackend], base: Base) -> None:
    store, backend = gated
    module = torch.nn.Linear(64, 64)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    metrics, metadata = {"m": 1.0}, {"list": [1]}
    backend.shut()
    with AsyncSaver(store) as saver:
        future = saver.save(module, metrics=metrics, metadata=metadata)
        with torch.no_grad():
            module.weight.add_(1)
            module.bias.zero_()
        metrics["m"] = 2.0
        metadata["list"].append(2)
        backend.gate.set()
        ckpt = future.result()
    assert same_bits(store.load(ckpt), before)
    assert (ckpt.metrics, ckpt.metadata) == ({"m": 1.0}, {"list": [1]})


def test_a_checkpoint_is_the_same_as_one_saved_in_the_foreground(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    other, other_base = twin(tmp_path, state)
    facts: dict[str, Any] = {
        "step": 4,
        "metrics": {"m": 0.5, "n": float("nan"), "f": torch.tensor(0.25)},
        "tags": ["a", "b"],
        "metadata": {"deep": {"er": [1, None]}},
    }
    with AsyncSaver(store) as saver:
        for tensors in (train_step(state, 0.1, 1), awkward_state()):
            here = saver.save(tensors, parent=base, **facts).result()
            there = other.save(tensors, parent=other_base, **facts)
            assert here.id == there.id
            assert here.stored_bytes == there.stored_bytes
            assert same_bits(store.load(here), other.load(there))


def test_the_next_save_waits_before_it_overwrites_the_copy(
    gated: tuple[Store, GatedBackend], base: Base, state: State
) -> None:
    store, backend = gated
    states = [train_step(state, 0.1, seed) for seed in range(2)]
    order: list[str] = []
    futures: list[Future[Checkpoint]] = []
    backend.shut()
    with AsyncSaver(store) as saver:
        futures.append(saver.save(states[0], parent=base))
        futures[0].add_done_callback(lambda future: order.append("the first is done"))
        begun = threading.Event()

        def save_again() -> None:
            begun.set()
            futures.append(saver.save(states[1], parent=base))
            order.append("the second has begun")

        caller = threading.Thread(target=save_again)
        caller.start()
        assert begun.wait(LONG)
        backend.gate.set()
        caller.join(LONG)
    assert order == ["the first is done", "the second has begun"]
    for future, expected in zip(futures, states, strict=True):
        assert same_bits(store.load(future.result()), expected)


def test_buffers_are_used_again_and_ties_stay_ties(store: Store, base: Base, state: State) -> None:
    watched = WatchedStore(store.path)
    with AsyncSaver(watched) as saver:
        for seed in range(3):
            saver.save(train_step(state, 0.1, seed), parent=base)
        changed = {**train_step(state, 0.1, 9), "model.scale": torch.ones(7)}
        saver.save(changed, parent=base)
    first, second, third, last = watched.places
    assert first == second == third
    assert first["model.embed.weight"] == first["lm_head.weight"]
    distinct = {name: place for name, place in first.items() if name != "lm_head.weight" and place}
    assert len(set(distinct.values())) == len(distinct)
    assert not set(distinct.values()) & {tensor.data_ptr() for tensor in state.values()}
    del last["model.scale"], first["model.scale"]
    assert last == first


def test_tied_tensors_cost_one_copy_of_bytes(tmp_path: Path, store: Store) -> None:
    state = make_state(big=True)
    base = store.add_base(write_base(tmp_path / "big.safetensors", state))
    with AsyncSaver(store) as saver:
        ckpt = saver.save(train_step(state, 0.02, 1), parent=base).result()
    assert ckpt.unreferenced_bytes == 0
    assert ckpt.stored_bytes < 0.03 * ckpt.logical_bytes


CALLS: dict[str, Callable[[AsyncSaver, State], object]] = {
    "save": lambda saver, state: saver.save(state),
    "wait": lambda saver, state: saver.wait(),
    "close": lambda saver, state: saver.close(),
    "the end of with": lambda saver, state: saver.__exit__(None, None, None),
}


@pytest.mark.parametrize("error", [StorageError, KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_surfaces_once_at_the_next_call(
    store: Store, base: Base, state: State, call: str, error: type[BaseException]
) -> None:
    failing, backend = faulty(store, error)
    saver = AsyncSaver(failing)
    backend.arm(0)
    saver.save(train_step(state, 0.1, 1), parent=base)
    with pytest.raises(error, match="injected failure"):
        CALLS[call](saver, state)
    saver.wait()
    assert store.log() == []
    if call in ("save", "wait"):
        assert saver.save(state, parent=base).result() in store.log()
    saver.close()


@pytest.mark.parametrize("ask", [Future.result, Future.exception])
def test_an_error_that_the_caller_has_taken_is_not_raised_again(
    store: Store, base: Base, state: State, ask: Callable[[Future[Checkpoint]], object]
) -> None:
    failing, backend = faulty(store)
    with AsyncSaver(failing) as saver:
        backend.arm(0)
        future = saver.save(train_step(state, 0.1, 1), parent=base)
        with contextlib.suppress(StorageError):
            assert isinstance(getattr(future, ask.__name__)(), StorageError)
        saver.wait()
        assert saver.save(state, parent=base).result() in store.log()


def test_an_error_on_its_way_out_is_not_replaced(store: Store, base: Base, state: State) -> None:
    failing, backend = faulty(store)
    backend.arm(0)
    saver = AsyncSaver(failing)
    future = saver.save(train_step(state, 0.1, 1), parent=base)
    with pytest.raises(KeyError), saver:
        raise KeyError
    assert future.done()
    with pytest.raises(StorageError):
        future.result()


def test_after_close_nothing_is_saved(store: Store, state: State) -> None:
    saver = AsyncSaver(store)
    future = saver.save(state)
    saver.close()
    assert future.done()
    saver.close()
    with pytest.raises(InvalidInputError, match="closed"):
        saver.save(state)
    assert store.log() == [future.result()]


@pytest.mark.parametrize(
    ("tensors", "keywords"),
    [
        ({"a": [1]}, {}),
        ({"a": torch.ones(1, device="meta")}, {}),
        ({}, {"step": -1}),
        ({}, {"metrics": {"m": "much"}}),
        ({}, {"metadata": {"object": object()}}),
        ({}, {"tags": "word"}),
    ],
)
def test_invalid_arguments_are_refused_at_the_call(
    store: Store, tensors: Any, keywords: dict[str, Any]
) -> None:
    with AsyncSaver(store) as saver, pytest.raises(InvalidInputError):
        saver.save(tensors, **keywords)


def test_save_has_the_parameters_of_the_stores_save() -> None:
    mine, stores = (inspect.signature(kind.save).parameters for kind in (AsyncSaver, Store))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in stores.values()
    ]


def test_a_crash_anywhere_leaves_a_complete_checkpoint_or_none(
    store: Store, base: Base, state: State
) -> None:
    first = store.save(state, parent=base)
    moved = train_step(state, 0.1, 1)
    struck = 0
    while True:
        failing, backend = faulty(store, SimulatedKill)
        backend.arm(struck)
        future = AsyncSaver(failing).save(moved, parent=base, step=struck)
        if future.exception() is None:
            break
        assert isinstance(future.exception(), SimulatedKill)
        after = Store.open(store.path)
        assert after.log() == [first]
        assert same_bits(after.load(first), state)
        struck += 1
    assert struck > 3
    assert same_bits(Store.open(store.path).load(future.result()), moved)


def test_a_forked_process_does_not_wait_forever(
    gated: tuple[Store, GatedBackend], base: Base, state: State
) -> None:
    store, backend = gated
    backend.shut()
    saver = AsyncSaver(store)
    future = saver.save(train_step(state, 0.1, 1), parent=base)
    assert backend.reached.wait(LONG)
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONG))
        answers = []
        for ask in (future.result, saver.wait):
            try:
                ask()
            except StorageError as error:
                answers.append("forked" in str(error))
        saver.wait()
        os._exit(0 if answers == [True, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    backend.gate.set()
    saver.close()
    assert store.log() == [future.result()]


def test_an_interpreter_that_ends_without_close_does_not_hang(store: Store) -> None:
    code = (
        "import sys, torch\n"
        "from msft_store import AsyncSaver, Store\n"
        "saver = AsyncSaver(Store.open(sys.argv[1]))\n"
        "saver.save({str(i): torch.randn(1 << 20) for i in range(8)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.path],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.returncode == 0, done.stderr
    after = Store.open(store.path)
    # The checkpoint is complete or absent, and its absence was reported.
    assert len(after.log()) == ("as the interpreter ended" not in done.stderr)
    for ckpt in after.log():
        after.load(ckpt)


@pytest.mark.parametrize("asked", [False, True])
def test_an_unread_error_is_printed_at_the_end(store: Store, asked: bool) -> None:
    code = (
        "import sys, torch\n"
        "from msft_store import AsyncSaver, Store\n"
        "saver = AsyncSaver(Store.open(sys.argv[1]))\n"
        "future = saver.save({'x': torch.ones(1)}, parent='nosuch')\n"
        "while not future.done():\n"
        "    pass\n"
        "if sys.argv[2] == 'True':\n"
        "    future.exception()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.path, str(asked)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert ("no caller asked" in done.stderr and "nosuch" in done.stderr) == (not asked)


Step = Callable[[Timeline, State], object]

WAITING: dict[str, Step] = {
    "commit": lambda line, state: line.commit(state, metrics={"m": 0.0}),
    "commit_async": lambda line, state: line.commit_async(state, metrics={"m": 0.0}).result(),
    "rollback": lambda line, state: line.rollback(next(iter(line.kept()))),
    "rewind": lambda line, state: line.rewind(0),
    "kept": lambda line, state: line.kept(),
    "last_commit": lambda line, state: line.last_commit,
    "wait": lambda line, state: line.wait(),
    "close": lambda line, state: line.close(),
}


@pytest.mark.parametrize("name", WAITING)
def test_whatever_a_timeline_does_waits_for_the_commit_under_way(
    gated: tuple[Store, GatedBackend], base: Base, state: State, name: str
) -> None:
    store, backend = gated
    line = Timeline(store, base, retention=KeepBest("m"))
    order: list[str] = []
    begun = threading.Event()
    backend.shut()
    future = line.commit_async(train_step(state, 0.1, 1), metrics={"m": 1.0})
    future.add_done_callback(lambda future: order.append("committed"))

    def act() -> None:
        begun.set()
        WAITING[name](line, state)
        order.append(name)

    caller = threading.Thread(target=act)
    caller.start()
    assert begun.wait(LONG)
    assert (line.root, line.branch) == (base, 0)
    backend.gate.set()
    caller.join(LONG)
    assert order == ["committed", name]
    assert (future.result() in store.log()) == (name != "rewind")


def test_a_timeline_in_the_background_is_the_same_timeline(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    other, other_base = twin(tmp_path, state)
    policy = KeepBest("m", 2) | KeepLast(1)
    lines = [
        Timeline(store, base, retention=policy),
        Timeline(other, other_base, retention=policy),
    ]
    scores = (1, 3, 2, 2.5, 9, 1)
    for number, score in enumerate(scores):
        state = train_step(state, 0.02, number)
        facts: dict[str, Any] = {"step": number, "metrics": {"m": score}, "metadata": {"n": number}}
        future = lines[0].commit_async(state, **facts)
        expected = lines[1].commit(state, **facts)
        assert future.result().id == expected.id
        assert lines[0].kept() == lines[1].kept()
        here, there = lines[0].last_commit, lines[1].last_commit
        assert here is not None
        assert there is not None
        assert here.dropped == there.dropped
        assert here.checkpoint.stored_bytes == there.checkpoint.stored_bytes
        if number == 3:
            future = lines[0].commit_async(state, step=99, metrics={"m": 0.0})
            lines[1].commit(state, step=99, metrics={"m": 0.0})
            best = max(other.log(), key=lambda ckpt: ckpt.metrics["m"])
            state = lines[0].rollback(best.id)
            assert same_bits(state, lines[1].rollback(best.id))
    assert {ckpt.id for ckpt in store.log()} == {ckpt.id for ckpt in other.log()}
    assert store.check() == []


def test_a_commit_is_judged_by_the_policy_of_its_call(
    gated: tuple[Store, GatedBackend], base: Base, state: State
) -> None:
    store, backend = gated
    line = Timeline(store, base, retention=KeepLast(2))
    first = line.commit(train_step(state, 0.1, 1), metrics={"m": 5.0})
    backend.shut()
    second = line.commit_async(train_step(state, 0.1, 2), metrics={"m": 1.0})
    line.retention = KeepBest("m")
    backend.gate.set()
    assert set(line.kept()) == {first.id, second.result().id}
    line.commit(train_step(state, 0.1, 3), metrics={"m": 0.0})
    assert set(line.kept()) == {first.id}


def test_a_commit_that_failed_in_the_background_can_be_repeated(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    other, other_base = twin(tmp_path, state)
    failing, backend = faulty(store)
    line = Timeline(failing, base, retention=KeepLast(2))
    sound = Timeline(other, other_base, retention=KeepLast(2))
    states = [train_step(state, 0.1, seed) for seed in range(2)]
    assert line.commit_async(states[0]).result().id == sound.commit(states[0]).id
    backend.arm(0)
    line.commit_async(states[1])
    with pytest.raises(StorageError, match="injected"):
        line.commit_async(states[1])
    assert line.commit_async(states[1]).result().id == sound.commit(states[1]).id
    assert set(line.kept()) == set(sound.kept())


def test_a_timeline_with_a_commit_that_failed_keeps_its_refs(
    store: Store, base: Base, state: State
) -> None:
    failing, backend = faulty(store)
    line = Timeline(failing, base, retention=KeepLast(2))
    line.commit(train_step(state, 0.1, 1))
    backend.arm(0)
    line.commit_async(train_step(state, 0.1, 2))
    with pytest.raises(StorageError), line:
        pass
    assert len(store.refs()) == 1


def test_after_an_error_a_timeline_leaves_nothing_under_way(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=KeepLast(2))
    future = line.commit_async(train_step(state, 0.1, 1))
    with pytest.raises(KeyError), line:
        raise KeyError
    assert future.done()
    assert store.log() == [future.result()]
