"""A second reader, written from ``docs/FORMAT.md`` alone, restores the stores of the product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msft_store import Store
from tests.support.plain_store import PlainStore
from tests.support.states import State, bits_of, make_state, train_step, write_base


def assert_read(store: Store, states: dict[str, State]) -> None:
    """Assert that the plain reader restores the given states, by checkpoint."""
    plain = PlainStore(Path(store.path))
    assert plain.checkpoints().keys() == states.keys()
    for identity, state in states.items():
        found = plain.restore(identity)
        assert found.keys() == state.keys()
        for name, (dtype, shape, data) in found.items():
            assert (f"torch.{dtype}", shape) == (str(state[name].dtype), list(state[name].shape))
            assert data == bits_of(state[name])


def choose_one(rng: np.random.Generator, things: Sequence[Any]) -> Any:
    return things[rng.integers(len(things))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_runs_of_saves_anchors_rebases_and_gcs(tmp_path: Path, dtype: torch.dtype) -> None:
    store, rng = Store.create(tmp_path / "store"), np.random.default_rng(4)
    names = ("model.layers.0.up.weight", "model.layers.0.norm.weight", "model.scale", "model.empty")
    wide = {name: make_state(dtype=torch.float32)[name] for name in names}
    base = store.add_base(write_base(tmp_path / "base.safetensors", wide))
    states: dict[str, State] = {}
    for seed in range(6):
        parent = choose_one(rng, [base, None, *store.log()])
        known = states.get(getattr(parent, "id", ""), {n: wide[n].to(dtype) for n in names})
        state = train_step(known, choose_one(rng, [0.0, 0.02, 0.6]), seed)
        states[store.save(state, parent=parent, step=seed).id] = state
        one, other = choose_one(rng, store.log()), choose_one(rng, store.log())
        if rng.random() < 0.5:
            store.anchor(one)
        elif one.base == other.base:
            store.rebase(one, other)
        if seed % 2:
            states.pop(one.id)
            store.forget(one)
            store.plan_gc().execute()
    assert_read(store, states)


def test_tensors_of_several_chunks(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    wide = torch.randn(1_500_000, generator=torch.Generator().manual_seed(1))
    base = store.add_base(write_base(tmp_path / "base.safetensors", {"w": wide}))
    state = {"w": wide.bfloat16(), "n": torch.arange(1_300_000, dtype=torch.int32)}
    states = {store.save(state, parent=base).id: state}
    for name in ("copy", "n"):
        state = {**state, name: state["n"].clone()}
        state[name][[7, 1_200_000]] = -1
        states[store.save(state, parent=store.log()[-1]).id] = state
    wider = {"w": wide.double(), "half": wide.half()}
    states[store.save(wider, parent=base).id] = wider
    assert_read(store, states)


def test_refs(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    state = make_state()
    ckpt = store.save(state)
    store.pin(ckpt, "runs/best-1.0")
    plain = PlainStore(Path(store.path))
    assert plain.refs() == {"runs/best-1.0": ckpt.id}
    assert plain.restore("runs/best-1.0") == plain.restore(ckpt.id)
