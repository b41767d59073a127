"""Import safetensors files as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from msft_store import Base, BaseError, Store
from msft_store.cli import import_ as module
from msft_store.cli.import_ import find_matching_base, import_checkpoint
from tests.support.states import State, same_bits, train_step


@pytest.fixture(params=[1, 1 << 30])
def _groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", request.param)


@pytest.mark.usefixtures("_groups")
def test_an_export_comes_back_as_a_checkpoint_of_equal_content(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    trained = train_step(state, 0.05, 1)
    saved = store.save(trained, parent=base, step=3, metrics={"loss": 0.5}, tags=("x",))
    store.export(saved, tmp_path / "out")

    found = import_checkpoint(
        store, tmp_path / "out", parent=base, step=3, metrics={"loss": 0.5}, tags=("x",)
    )

    assert found.id == saved.id
    other = Store.create(tmp_path / "other")
    again = import_checkpoint(other, tmp_path / "out")
    assert same_bits(other.load(again), trained)
    assert other.check() == []


def test_shards_and_odd_tensors_are_read(tmp_path: Path, store: Store) -> None:
    shards = {"a": {"one": torch.ones(3)}, "b": {"empty": torch.ones(0, 4), "0-d": torch.tensor(2)}}
    for name, shard in shards.items():
        safetensors.torch.save_file(shard, tmp_path / f"{name}.safetensors")

    assert same_bits(store.load(import_checkpoint(store, tmp_path)), shards["a"] | shards["b"])


def test_invalid_files_make_no_checkpoint(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BaseError):
        import_checkpoint(store, tmp_path)
    path.unlink()
    for name in "ab":
        safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BaseError, match="twice"):
        import_checkpoint(store, tmp_path)
    assert store.log() == []


def test_the_only_base_matches_a_model_with_its_tensors(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    def fits(tensors: State) -> Base | None:
        path = tmp_path / "asked.safetensors"
        safetensors.torch.save_file({n: t.clone() for n, t in tensors.items()}, path)
        return find_matching_base(store, path)

    names = list(state)
    assert fits(state) == base
    assert fits({f"module.{name}": tensor for name, tensor in state.items()}) == base
    assert fits({name: state[name] for name in names[2:5]}) == base
    assert fits(state | {"head.weight": torch.ones(2)}) == base
    assert fits({name: state[name] for name in names[2:5]} | {"head.weight": torch.ones(2)}) is None
    assert fits({name: state[name][:1] for name in names[2:5]}) is None
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, other)
    store.add_base(other)
    assert fits(state) is None
