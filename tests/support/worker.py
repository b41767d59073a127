"""A process that works on a store until it is killed, and reports its actions.

It writes JSON lines to a pipe: each action at its start, and again with its result as ``id``. The
``step`` of a checkpoint is the seed of its tensors, so a reader can compute the expected tensors.

Example::

    worker = Worker(store_path, base_id, seed=3)
    worker.kill_after(lines=5, delay=0.002)
    for message in worker.messages: ...
"""

from __future__ import annotations

import functools
import json
import os
import random
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msft_store import Checkpoint, KeepBest, KeepLast, Store, Timeline
from tests.support.states import State, make_state, train_step

NAME = "run"
MARK = "mark"
_MOST_SAVES = 6


@functools.cache
def start() -> State:
    """Return the base's tensors."""
    return {name: tensor for name, tensor in make_state().items() if "layers.0" in name}


@functools.lru_cache(maxsize=100)
def state_of(seed: int) -> State:
    """Return the tensors of the checkpoint with that step."""
    return train_step(start(), 0.1, seed)


class Worker:
    """A forked process; ``messages`` has its reports after the kill."""

    def __init__(self, path: Path, base: str, *, seed: int) -> None:
        self.messages: list[dict[str, Any]] = []
        self._reading, writing = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            try:
                os.close(self._reading)
                _Work(path, base, random.Random(seed), writing).go_on()  # noqa: S311
            except BaseException:
                _send(writing, error=traceback.format_exc())
            finally:
                os._exit(1)
        os.close(writing)

    def kill_after(self, *, lines: int, delay: float) -> None:
        """Kill it ``delay`` seconds after its report number ``lines``, or at the next report."""
        text = b""
        while text.count(b"\n") < lines:
            more = os.read(self._reading, 1 << 16)
            if not more:
                break
            text += more
        select.select([self._reading], [], [], delay)
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        # The reports that it sent before it died count.
        while more := os.read(self._reading, 1 << 16):
            text += more
        os.close(self._reading)
        self.messages = [json.loads(line) for line in text.decode().split("\n")[:-1]]


class _Work:
    def __init__(self, path: Path, base: str, rng: random.Random, writing: int) -> None:
        self._rng = rng
        self._writing = writing
        self._base = base
        self._path = path
        self._store = Store.open(path)
        self._line = Timeline(
            self._store,
            self._store.base(base),
            retention=KeepLast(1) | KeepBest("score"),
            name=NAME,
        )

    def go_on(self) -> None:
        actions = [self._save, self._pin, self._commit, self._roll_back, self._gc]
        while True:
            self._rng.choices(actions, weights=[2, 1, 3, 1, 1])[0]()

    def _save(self) -> None:
        plain = [c for c in self._store.log() if not c.metadata]
        if len(plain) >= _MOST_SAVES:
            old = next(c for c in plain if c.id not in self._store.refs().values())
            self._do("forget", lambda: self._store.forget(old), about=old.id)
            plain.remove(old)
        seed = self._rng.randrange(1 << 30)
        parent = self._rng.choice([self._base, *plain])
        self._do("save", lambda: self._store.save(state_of(seed), parent=parent, step=seed))

    def _pin(self) -> None:
        plain = [c for c in self._store.log() if not c.metadata]
        if plain:
            target = self._rng.choice(plain)
            self._do("pin", lambda: self._store.pin(target, MARK), about=target.id)

    def _commit(self) -> None:
        seed, score = self._rng.randrange(1 << 30), self._rng.random()
        state, facts = state_of(seed), {"step": seed, "metrics": {"score": score}}
        if self._rng.random() < 0.5:
            self._do("commit", lambda: self._line.commit(state, **facts), score=score)
        else:
            later = self._line.commit_async
            self._do("commit", lambda: later(state, **facts).result(), score=score)

    def _roll_back(self) -> None:
        target = self._rng.choice([*self._line.kept()] or [None])
        if target is not None:
            self._do("roll back", lambda: self._line.rollback(target), about=target)

    def _gc(self) -> None:
        self._do("gc", lambda: self._store.plan_gc().execute())

    def _do(self, what: str, action: Callable[[], object], **facts: Any) -> None:
        _send(self._writing, begun=what, **facts)
        result = action()
        found = {"id": result.id} if isinstance(result, Checkpoint) else {}
        _send(self._writing, done=what, **facts, **found)


def _send(writing: int, **fields: Any) -> None:
    os.write(writing, json.dumps(fields).encode() + b"\n")
