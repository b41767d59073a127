"""A resident reference: the same checkpoints, found on the device of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from msft_store import KeepLast, Resident, Store, Timeline
from msft_store.format.layout import CHUNK_BYTES

ROWS = CHUNK_BYTES // 2 // 512 + 3


class Model(torch.nn.Module):
    """Tied, of several dtypes, one tensor longer than a chunk."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
            values = torch.randn(*shape, generator=generator) * 0.02
            return torch.nn.Parameter(values.to(dtype), requires_grad=False)

        self.embedding = weights(ROWS, 512, dtype=torch.bfloat16)
        self.head = self.embedding
        self.thin = weights(70, 33, dtype=torch.float16)
        self.norm = weights(300, dtype=torch.float32)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


@torch.no_grad()
def train(model: Model, step: int) -> None:
    """Move a few weights of each tensor, and the buffer."""
    generator = torch.Generator().manual_seed(step)
    for weights in model.parameters():
        moved = torch.rand(weights.shape, generator=generator) < 0.05
        weights.add_((moved * 1e-4).to(weights.dtype))
    model.steps += 1


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def base_file(tmp_path: Path, model: Model) -> Path:
    path = tmp_path / "base.safetensors"
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head"}
    safetensors.torch.save_file(state, path)
    return path


def stores(tmp_path: Path, base_file: Path) -> tuple[Store, Store]:
    found = tuple(Store.create(tmp_path / name) for name in ("with", "without"))
    for store in found:
        store.add_base(base_file)
    return found[0], found[1]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_checkpoint_in_the_same_bytes(
    tmp_path: Path, base_file: Path, model: Model
) -> None:
    one, other = stores(tmp_path, base_file)
    resident = Resident(model)
    train(model, 1)
    compared = resident.compare(model)
    assert {name for name, _ in compared} == {"embedding", "head", "thin", "norm"}
    assert {number for name, number in compared if name == "embedding"} == {0, 1}
    mine = one.save(model, parent=one.bases()[0], step=1, compared=compared)
    theirs = other.save(model, parent=other.bases()[0], step=1)
    assert mine.id == theirs.id
    assert packs(one) == packs(other)
    assert equal(one.load(mine), model.state_dict())


def test_a_save_encodes_the_changes_that_the_comparison_found(
    tmp_path: Path, base_file: Path, model: Model
) -> None:
    store = Store.create(tmp_path / "store")
    base = store.add_base(base_file)
    resident = Resident(model)
    train(model, 1)
    compared = dict(resident.compare(model))
    damaged = compared["norm", 0].found.symbols
    damaged ^= 1
    ckpt = store.save(model, parent=base, compared=compared)
    assert equal(store.load(ckpt), model.state_dict())
    assert store.check() == []


def test_weights_that_went_on_after_they_were_compared_are_saved_as_they_are(
    tmp_path: Path, base_file: Path, model: Model
) -> None:
    store = Store.create(tmp_path / "store")
    base = store.add_base(base_file)
    resident = Resident(model)
    train(model, 1)
    compared = resident.compare(model)
    train(model, 2)
    ckpt = store.save(model, parent=base, compared=compared)
    assert equal(store.load(ckpt), model.state_dict())


def test_a_resident_of_another_model_is_never_wrong(
    tmp_path: Path, base_file: Path, model: Model
) -> None:
    one, other = stores(tmp_path, base_file)
    compared = Resident(Model(seed=7)).compare(model)
    train(model, 1)
    mine = one.save(model, parent=one.bases()[0], compared=compared)
    theirs = other.save(model, parent=other.bases()[0])
    assert packs(one) == packs(other)
    assert equal(one.load(mine), other.load(theirs))


def test_a_copy_that_training_does_not_touch(model: Model) -> None:
    resident = Resident(model)
    assert resident.compare(model) == {}
    train(model, 1)
    assert resident.compare(model)


def test_tensors_that_nothing_resident_is_like(model: Model) -> None:
    resident = Resident(model)
    train(model, 1)
    state = {
        "new": torch.ones(5),
        "thin": model.thin.float(),
        "norm": model.norm[:200],
        "embedding": model.embedding.t(),
    }
    assert {name for name, _ in resident.compare(state)} <= {"embedding"}


@pytest.mark.parametrize("background", [False, True])
def test_a_timeline_compares_and_renews_its_resident(
    tmp_path: Path, base_file: Path, model: Model, background: bool
) -> None:
    ids = []
    for name, resident in (("with", True), ("without", False)):
        model = Model()
        store = Store.create(tmp_path / name)
        timeline = Timeline(store, store.add_base(base_file), retention=KeepLast(3))
        if resident:
            timeline.resident = Resident(model)
        first = timeline.resident
        commit = timeline.commit_async if background else timeline.commit
        for step in range(1, 4):
            train(model, step)
            commit(model, step)
        timeline.wait()
        second = next(c for c in store.log() if c.step == 2)
        timeline.rollback(second, into=model)
        assert (timeline.resident is not first) == resident
        if resident:
            assert timeline.resident is not None
            assert timeline.resident.compare(model) == {}
        train(model, 9)
        commit(model, 9)
        timeline.wait()
        assert equal(store.load(store.log()[-1]), model.state_dict())
        ids.append([checkpoint.id for checkpoint in store.log()])
    assert ids[0] == ids[1]


def packs(store: Store) -> list[str]:
    """Return the names of packs, which are digests of what they hold."""
    return sorted(path.name for path in Path(store.path, "packs").iterdir())
