"""Random histories of a store: all operations except those of timelines.

Example::

    run_state_machine_as_test(type("Run", (StoreHistories,), {"ledger": faults}))
"""

from __future__ import annotations

import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from msft_store import (
    AsyncSaver,
    Checkpoint,
    InvalidInputError,
    MismatchError,
    PinnedError,
    Store,
    UnknownCheckpointError,
)
from tests.support.changes import KINDS, changed
from tests.support.histories import METRICS, PARTS, PICKS, SEEDS, SHARES, Histories, module_of
from tests.support.invariants import files
from tests.support.model import NEW, Point
from tests.support.naive import Parts, policy_of
from tests.support.states import State, same_bits

NAMES = st.sampled_from(("best", "runs/last", "x"))


class StoreHistories(Histories):
    """Saves, loads, refs, gc, export and counting."""

    @rule(
        at=PICKS,
        parent=PICKS,
        kind=st.sampled_from(KINDS),
        share=SHARES,
        seed=SEEDS,
        step=st.integers(0, 3) | st.none(),
        metrics=METRICS,
        background=st.booleans(),
        near=PICKS | st.none(),
    )
    def save(
        self,
        *,
        at: int,
        parent: int,
        kind: str,
        share: float,
        seed: int,
        step: int | None,
        metrics: dict[str, float],
        background: bool,
        near: int | None,
    ) -> None:
        opened, above = self._any(at), self._parent(parent)
        state = changed(self._source(above, seed), kind, share, seed)
        tags = ("tag",) * (seed % 2)
        point = Point(
            state=state,
            parent=above,
            base=self._base_of(above),
            step=step,
            metrics=metrics,
            tags=tags,
            metadata={"seed": seed % 4},
        )
        facts = {
            "step": step,
            "metrics": metrics,
            "tags": tags,
            "metadata": {"seed": seed % 4},
            "parent": above,
            "references": [self._pick(near)] if near is not None and self.model.points else None,
        }

        def work() -> Checkpoint:
            if not background:
                return opened.store.save(state, **facts)
            with AsyncSaver(opened.store) as saver:
                return self._meanwhile(state, lambda copy: saver.save(copy, **facts)).result()

        after = self.model.copy()
        identity = after.add(point)
        ckpt = self._do(opened, after, work, born=point)
        if ckpt is not None:
            assert ckpt.id in (identity, *([] if identity != NEW else self.model.points))
            self._same(opened.store, ckpt.id)

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS, how=st.integers(0, 4), prefix=st.integers(12, 32))
    def load(self, at: int, which: int, how: int, prefix: int) -> None:
        opened, identity = self._any(at), self._pick(which)
        state, store = self.model.points[identity].state, opened.store
        some = sorted(state)[: which % 4]
        refs = [name for name, (target, _) in self.model.refs.items() if target == identity]
        into = {name: torch.ones_like(tensor) for name, tensor in state.items()}

        def work() -> State:
            if how == 0:
                return store.load(identity[:prefix])
            if how == 1:
                return store.load(refs[0] if refs else identity)
            if how == 2:
                return store.load(store.get(identity), names=some)
            target = module_of(into) if how == 3 else into
            store.load_into(target, identity)
            return dict(target.state_dict()) if how == 3 else into

        expected = {name: state[name] for name in some} if how == 2 else state
        found = self._do(opened, self.model, work)
        assert found is None or same_bits(found, expected)

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS)
    def load_what_does_not_fit(self, at: int, which: int) -> None:
        opened, identity = self._any(at), self._pick(which)
        target = {"nothing like it": torch.zeros(3)}
        self._do(
            opened,
            self.model,
            lambda: opened.store.load_into(target, identity),
            refused=MismatchError,
        )
        self._do(
            opened,
            self.model,
            lambda: opened.store.load("feedfeed" * 4),
            refused=UnknownCheckpointError,
        )

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS, name=NAMES, value=st.integers(0, 2))
    def pin(self, at: int, which: int, name: str, value: int) -> None:
        opened, identity = self._any(at), self._pick(which)
        after, note = self.model.copy(), {"why": [value]}
        after.refs[name] = (identity, note)
        self._do(opened, after, lambda: opened.store.pin(identity, name, note=note))

    @rule(at=PICKS, name=NAMES)
    def unpin(self, at: int, name: str) -> None:
        opened, after = self._any(at), self.model.copy()
        refused = None if after.refs.pop(name, None) else UnknownCheckpointError
        self._do(opened, after, lambda: opened.store.unpin(name), refused=refused)

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS)
    def forget(self, at: int, which: int) -> None:
        opened, identity = self._any(at), self._pick(which)
        after = self.model.copy()
        after.evict([identity])
        refused = PinnedError if identity in after.points else None
        self._do(opened, after, lambda: opened.store.forget(identity), refused=refused)

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS)
    def anchor(self, at: int, which: int) -> None:
        opened, identity = self._any(at), self._pick(which)
        ckpt = self._do(opened, self.model, lambda: opened.store.anchor(identity))
        if ckpt is not None:
            self._stored_as_said(opened.store, ckpt)

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS, other=PICKS)
    def rebase(self, at: int, which: int, other: int) -> None:
        opened, identity, onto = self._any(at), self._pick(which), self._pick(other)
        points = self.model.points
        refused = None if points[identity].base == points[onto].base else InvalidInputError
        ckpt = self._do(
            opened, self.model, lambda: opened.store.rebase(identity, onto), refused=refused
        )
        if ckpt is not None:
            self._stored_as_said(opened.store, ckpt)

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS, other=PICKS)
    def release(self, at: int, which: int, other: int) -> None:
        opened, some = self._any(at), {self._pick(which), self._pick(other)}
        if self._do(opened, self.model, lambda: opened.store.release(some)) is not None:
            for identity in some:
                self._same(opened.store, identity)

    def _stored_as_said(self, store: Store, ckpt: Checkpoint) -> None:
        assert ckpt.id in self.model.points
        assert ckpt.stored_bytes == self._open().store.get(ckpt.id).stored_bytes
        self._same(store, ckpt.id)

    @rule(at=PICKS, parts=st.none() | PARTS)
    def gc(self, at: int, parts: Parts | None) -> None:
        opened, after = self._any(at), self.model.copy()
        policy = None if parts is None else policy_of(parts)
        if parts is not None and self.model.unknown_metric(parts):
            work = lambda: opened.store.plan_gc(policy)  # noqa: E731
            self._do(opened, self.model, work, refused=InvalidInputError)
            return
        if parts is not None:
            after.collect(parts)
        plan = self._do(opened, self.model, lambda: opened.store.plan_gc(policy))
        if plan is None:
            return
        assert {verdict.checkpoint.id for verdict in plan.kept} == after.points.keys()
        result = self._do(opened, after, plan.execute)
        if result is not None and self.clean:
            assert result.bytes == opened.store.stats().on_disk_bytes <= result.peak_bytes
            left = opened.store.plan_gc()
            assert (left.delete, left.rewrite, left.leftovers) == ((), (), ())

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, picks=st.lists(PICKS, max_size=4))
    def evict(self, at: int, picks: list[int]) -> None:
        opened, after = self._any(at), self.model.copy()
        identities = [self._pick(number) for number in picks]
        after.evict(identities)
        self._do(opened, after, lambda: opened.store.evict(identities))

    @precondition(lambda self: self.model.points)
    @rule(at=PICKS, which=PICKS)
    def export(self, at: int, which: int) -> None:
        opened, identity = self._any(at), self._pick(which)
        target = self.folder / f"export {self.steps}"
        if (
            self._do(
                opened,
                self.model,
                # The other layout gives swapped and renamed tensors the names in the base again.
                lambda: opened.store.export(identity, target, layout="memory"),
            )
            is None
        ):
            assert not target.exists()
            return
        found = safetensors.torch.load_file(target / "model.safetensors")
        assert same_bits(found, self.model.points[identity].state)

    @rule(at=PICKS, read_data=st.booleans())
    def check(self, at: int, *, read_data: bool) -> None:
        opened = self._any(at)
        findings = self._do(opened, self.model, lambda: opened.store.check(read_data))
        assert not findings or not self.clean, findings

    @rule(at=PICKS)
    def count(self, at: int) -> None:
        opened = self._any(at)
        stats = self._do(opened, self.model, opened.store.stats)
        if stats is not None:
            assert stats.checkpoints == len(self.model.points)
            assert stats.held_bytes == opened.store.held_bytes()
            assert stats.on_disk_bytes == sum(files(self.folder / "store").values())
            logical = sum(ckpt.logical_bytes for ckpt in opened.store.log())
            assert stats.logical_bytes == logical
