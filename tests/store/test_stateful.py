"""Any sequence of operations, against a plain dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from msft_store import (
    Champions,
    DiskBudget,
    InvalidInputError,
    KeepBest,
    KeepLast,
    PinnedError,
    Policy,
    Store,
)
from tests.support.states import State, same_bits, train_step, write_base

SEEDS = st.integers(0, 1 << 20)
SHARES = st.floats(0, 1)
NAMES = st.sampled_from(("best", "runs/last", "x"))
POLICIES = st.sampled_from(
    (
        None,
        KeepLast(2),
        KeepBest("m", 2),
        Champions({"m": "min"}) | KeepLast(1),
        KeepLast(5) | DiskBudget(1 << 30),
    )
)


def small_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": (0.02 * torch.randn(20, 30, generator=generator)).bfloat16(),
        "b": (0.02 * torch.randn(40, generator=generator)).bfloat16(),
        "c": torch.arange(5),
    }


class StoreMachine(RuleBasedStateMachine):
    """A store beside what it should hold."""

    checkpoints = Bundle("checkpoints")

    @initialize(target=checkpoints)
    def begin(self) -> object:
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store.create(self.folder / "store")
        self.starts = [small_state(0), small_state(1)]
        self.bases = [
            self.store.add_base(write_base(self.folder / f"{i}.safetensors", start))
            for i, start in enumerate(self.starts)
        ]
        self.states: dict[str, State] = {}
        self.refs: dict[str, str] = {}
        self.steps = 0
        return multiple()

    @rule(
        target=checkpoints, which=st.sampled_from((0, 1, None)), share=st.floats(0, 1), seed=SEEDS
    )
    def save_from_base(self, which: int | None, share: float, seed: int) -> str:
        start = self.starts[which or 0]
        parent = None if which is None else self.bases[which]
        return self._save(train_step(start, share, seed), parent, seed)

    @rule(
        target=checkpoints,
        parent=checkpoints,
        share=st.sampled_from((0.0, 0.02, 0.3)),
        seed=SEEDS,
        change=st.sampled_from(("no", "no", "new tensor", "dtype", "drop")),
    )
    def save_from_checkpoint(self, *, parent: str, share: float, seed: int, change: str) -> object:
        if parent not in self.states:
            return multiple()
        state = train_step(self.states[parent], share, seed)
        if change == "new tensor":
            state[f"new {seed % 3}"] = torch.full((seed % 50,), float(seed))
        elif change == "dtype":
            state["a"] = state["a"].to(torch.float32 if seed % 2 else torch.bfloat16)
        elif change == "drop":
            state.pop("b", None)
        return self._save(state, parent, seed)

    def _save(self, state: State, parent: object, seed: int) -> str:
        self.steps += 1
        ckpt = self.store.save(
            state,
            parent=parent,  # type: ignore[arg-type]
            step=self.steps,
            metrics={"m": float(seed % 7)},
        )
        self.states[ckpt.id] = state
        return ckpt.id

    @rule(ckpt=checkpoints, prefix=st.integers(8, 32))
    def load(self, ckpt: str, prefix: int) -> None:
        if ckpt in self.states:
            assert same_bits(self.store.load(ckpt[:prefix]), self.states[ckpt])

    @rule(ckpt=checkpoints, name=NAMES)
    def pin(self, ckpt: str, name: str) -> None:
        if ckpt in self.states:
            self.store.pin(ckpt, name)
            self.refs[name] = ckpt

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        if self.refs.pop(name, None) is not None:
            self.store.unpin(name)

    @rule(ckpt=consumes(checkpoints))
    def forget(self, ckpt: str) -> None:
        if ckpt not in self.states:
            return
        try:
            self.store.forget(ckpt)
            assert ckpt not in self.refs.values()
            del self.states[ckpt]
        except PinnedError:
            assert ckpt in self.refs.values()

    @rule(ckpt=checkpoints)
    def anchor(self, ckpt: str) -> None:
        if ckpt in self.states:
            assert self.store.anchor(ckpt).id == ckpt

    @rule(ckpt=checkpoints, onto=checkpoints)
    def rebase(self, ckpt: str, onto: str) -> None:
        if ckpt in self.states and onto in self.states:
            try:
                assert self.store.rebase(ckpt, onto).id == ckpt
            except InvalidInputError:
                assert self.store.get(ckpt).base != self.store.get(onto).base

    @rule(policy=POLICIES)
    def gc(self, policy: Policy | None) -> None:
        plan = self.store.plan_gc(policy)
        kept = {verdict.checkpoint.id for verdict in plan.kept}
        assert set(self.refs.values()) <= kept
        result = plan.execute()
        self.states = {identity: self.states[identity] for identity in kept}
        assert result.bytes == self.store.stats().on_disk_bytes
        assert self.store.plan_gc().freed_bytes < 1000

    @rule()
    def open_again(self) -> None:
        self.store = Store.open(self.folder / "store")

    @invariant()
    def lists_what_it_should(self) -> None:
        assert {ckpt.id for ckpt in self.store.log()} == set(self.states)
        assert self.store.refs() == self.refs

    def teardown(self) -> None:
        for identity, state in self.states.items():
            assert same_bits(self.store.load(identity), state)
        assert self.store.check() == []
        shutil.rmtree(self.folder)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
