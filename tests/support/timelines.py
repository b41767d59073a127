"""Random histories with timelines: resume, commit, roll back, rewind, close, abandon.

Example::

    run_state_machine_as_test(type("Run", (TimelineHistories,), {"ledger": faults}))
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from msft_store import Checkpoint, InvalidInputError, Store, Timeline
from tests.support.changes import KINDS, changed
from tests.support.histories import METRICS, PARTS, PICKS, SHARES, Histories, Opened, module_of
from tests.support.model import NEW, Point
from tests.support.naive import Parts, policy_of
from tests.support.states import State, same_bits

NAMES = st.sampled_from(("main", "main", "other"))
FEW = st.integers(0, 7)
"""Few seeds, so that equal states are committed more than once."""


def has_lines(machine: TimelineHistories) -> bool:
    return bool(machine.lines)


class TimelineHistories(Histories):
    """Timelines and all other operations; after a kill each timeline is resumed or abandoned."""

    def _line(self, number: int) -> tuple[str, Opened, Timeline]:
        name = sorted(self.lines)[number % len(self.lines)]
        return name, *self.lines[name]

    @rule(at=PICKS, name=NAMES, start=PICKS, parts=PARTS)
    def take_up(self, at: int, name: str, start: int, parts: Parts) -> None:
        opened, begin = self._any(at), self._parent(start)
        after = self.model.copy()
        after.take_up(name, begin, parts)
        line = self._do(
            opened,
            after,
            lambda: Timeline(
                opened.store,
                self._object(opened.store, begin),
                retention=policy_of(parts),
                name=name,
            ),
        )
        if line is not None:
            self.lines[name] = opened, line
            self._agrees(name)
        else:
            # The previous timeline lost the checkpoints that this one began to evict.
            self.lines.pop(name, None)
            self.model.lines.pop(name, None)

    def _object(self, store: Store, identity: str | None) -> Any:
        if identity is None:
            return None
        return store.base(identity) if identity in self.bases else store.get(identity)

    def _agrees(self, name: str) -> None:
        (_, line), expected = self.lines[name], self.model.lines[name]
        root = line.root.id if isinstance(line.root, Checkpoint) else None
        assert (root, line.branch) == (expected.root, expected.branch)

    @precondition(has_lines)
    @rule(which=PICKS, parts=PARTS)
    def keep_otherwise(self, which: int, parts: Parts) -> None:
        name, _, line = self._line(which)
        line.retention, self.model.lines[name].parts = policy_of(parts), parts

    @precondition(has_lines)
    @rule(
        which=PICKS,
        kind=st.sampled_from(KINDS),
        share=SHARES,
        seed=FEW,
        measured=st.lists(METRICS, min_size=1, max_size=5),
        background=st.booleans(),
    )
    def commit(
        self,
        *,
        which: int,
        kind: str,
        share: float,
        seed: int,
        measured: list[dict[str, float]],
        background: bool,
    ) -> None:
        name, _, _ = self._line(which)
        for number, metrics in enumerate(measured):
            if name in self.lines:
                self._commit_one(name, (kind, share, (seed + number) % 8), metrics, background)

    def _commit_one(
        self, name: str, change: tuple[str, float, int], metrics: dict[str, float], background: bool
    ) -> None:
        kind, share, seed = change
        opened, line = self.lines[name]
        expected = self.model.lines[name]
        parent = expected.root or expected.start
        state = changed(self._source(parent, seed), kind, share, seed)
        position = {"name": name, "branch": expected.branch, "index": expected.next}
        point = Point(
            state=state,
            parent=parent,
            base=self._base_of(parent),
            step=seed % 5,
            metrics=metrics,
            metadata={"seed": seed % 2, "timeline": position},
        )

        def work() -> Checkpoint:
            facts = (seed % 5, metrics, {"seed": seed % 2})
            if not background:
                return line.commit(state, *facts)
            return self._meanwhile(state, lambda copy: line.commit_async(copy, *facts)).result()

        if self.model.refuses(expected, metrics):
            self._do(opened, self.model, work, refused=InvalidInputError)
        elif not self._commit(name, point, work) and name in self.lines:
            # A repetition of a failed commit gives the same checkpoint.
            known = self.model.copy().add(point)
            self.model.lines[name].members |= {known} - {NEW}
            assert self._commit(name, point, work, safely=True)

    def _commit(self, name: str, point: Point, work: Any, *, safely: bool = False) -> bool:
        opened, line = self.lines[name]
        before, after = self.model, self.model.copy()
        keep = after.commit(name, point)
        ckpt = self._do(opened, after, work, safely=safely, born=point, protects_first=True)
        if ckpt is None:
            return False
        done = line.last_commit
        assert done is not None
        assert done.checkpoint.id == ckpt.id
        assert done.kept.keys() == {ckpt.id if identity == NEW else identity for identity in keep}
        assert all(done.kept.values())
        gone = (before.points.keys() | {ckpt.id}) - self.model.points.keys()
        assert gone <= set(done.dropped)
        assert not self.model.points.keys() & set(done.dropped)
        assert done.bytes == opened.store.stats().on_disk_bytes <= done.peak_bytes
        if ckpt.id in self.model.points:
            self._same(opened.store, ckpt.id)
        return True

    @precondition(lambda self: self.lines and self.model.points)
    @rule(which=PICKS, to=PICKS, own=st.booleans(), into=st.booleans())
    def rollback(self, *, which: int, to: int, own: bool, into: bool) -> None:
        name, opened, line = self._line(which)
        before = self.model.lines[name]
        ids = self.model.in_order(before.members & self.model.points.keys())
        identity = ids[to % len(ids)] if own and ids else self._pick(to)
        after, state = self.model.copy(), self.model.points[identity].state
        keep = after.rollback(name, identity)
        module = module_of({name: torch.ones_like(tensor) for name, tensor in state.items()})

        def work() -> State:
            if not into:
                return line.rollback(identity)
            assert line.rollback(identity, into=module) == {}
            return dict(module.state_dict())

        found = self._do(opened, after, work, protects_first=True)
        if found is not None:
            assert same_bits(found, state)
            self._agrees(name)
            assert line.last_commit is not None
            assert line.last_commit.kept.keys() == keep
            assert line.last_commit.bytes == opened.store.stats().on_disk_bytes
        elif name in self.lines:
            self._half_rolled_back(name, after.refs[f"timelines/{name}/root"], identity)

    def _half_rolled_back(self, name: str, root: tuple[str, Any], identity: str) -> None:
        """After an error: the new branch has begun once the ref to its root is there."""
        line = self.model.lines[name]
        if self.model.refs.get(f"timelines/{name}/root") == root:
            line.given |= {identity} - line.members
            line.members.add(identity)
            line.root, line.branch, line.next, line.counted = identity, line.branch + 1, 1, True
        self._agrees(name)

    @precondition(has_lines)
    @rule(which=PICKS, index=st.integers(-1, 6))
    def rewind(self, which: int, index: int) -> None:
        name, opened, line = self._line(which)
        expected, after = self.model.lines[name], self.model.copy()
        if index < 0 or (expected.counted and index > expected.next):
            work = lambda: line.rewind(index)  # noqa: E731
            self._do(opened, self.model, work, refused=InvalidInputError)
        else:
            after.rewind(name, index)
            self._do(opened, after, lambda: line.rewind(index))

    @precondition(has_lines)
    @rule(which=PICKS)
    def close(self, which: int) -> None:
        name, opened, line = self._line(which)
        after, mark = self.model.copy(), f"timelines/{name}/closed"
        after.close(name)
        self._do(opened, after, line.close, passing=mark)
        if name in self.model.lines:
            after = self.model.copy()
            after.close(name)
            self._do(opened, after, line.close, passing=mark, safely=True)
        self.lines.pop(name, None)
        with pytest.raises(InvalidInputError):
            line.rewind(0)
