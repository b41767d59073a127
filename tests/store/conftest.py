"""A store with a base, as most tests need it."""

from __future__ import annotations

from pathlib import Path

import pytest

from msft_store import Base, Checkpoint, Store
from tests.support.states import State, make_state, train_step, write_base


@pytest.fixture
def state() -> State:
    return make_state()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture
def base(tmp_path: Path, store: Store, state: State) -> Base:
    return store.add_base(write_base(tmp_path / "base.safetensors", state))


@pytest.fixture
def ckpt(store: Store, base: Base, state: State) -> Checkpoint:
    return store.save(train_step(state, 0.05, 1), parent=base, step=7)
