"""Two records of one chunk with equal preference, one of which refers to a deleted chunk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from msft_store import Checkpoint, Store
from msft_store.objects.packs import read_pack
from msft_store.storage.backend import LocalBackend
from tests.support.rot import changed_at


class Rivals:
    """A store in which two processes stored one chunk at once, each as a change of its parent.

    Neither saw what the other one saves, and both changes take as many bytes.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(512, generator=generator)
        first, second = self.weights.clone(), self.weights.clone()
        first.view(torch.int32)[1] += 1
        second.view(torch.int32)[2] += 1
        self.store = Store.create(folder / "one")
        self.parents = [self.store.save({"w": tensor}) for tensor in (first, second)]
        shutil.copytree(folder / "one", folder / "two")
        before = self.packs()
        large, small = torch.randn(9999, generator=generator), torch.randn(999, generator=generator)
        self.one = self.store.save({"w": self.weights, "x": small}, parent=self.parents[0])
        (self.pack,) = self.packs() - before
        two = Store.open(folder / "two")
        self.two: Checkpoint = two.save({"w": self.weights, "y": large}, parent=self.parents[1])
        for name in ("packs", "manifests"):
            shutil.copytree(folder / "two" / name, folder / "one" / name, dirs_exist_ok=True)

    def packs(self) -> set[Path]:
        return set(Path(self.store.path, "packs").iterdir())

    def assert_whole(self, ckpt: Checkpoint) -> None:
        again = Store.open(self.store.path)
        assert again.check() == []
        assert torch.equal(again.load(ckpt, names=["w"])["w"], self.weights)
        assert again.plan_gc().freed_bytes == 0


@pytest.mark.parametrize("seed", range(24))
def test_a_record_that_gc_moves_is_preferred_to_its_equal(tmp_path: Path, seed: int) -> None:
    rivals = Rivals(tmp_path, seed)
    for ckpt in (rivals.one, *rivals.parents):
        rivals.store.forget(ckpt)
    rivals.store.plan_gc().execute()
    rivals.assert_whole(rivals.two)


@pytest.mark.parametrize("seed", range(24))
def test_a_record_that_repair_moves_is_preferred_to_its_equal(tmp_path: Path, seed: int) -> None:
    rivals = Rivals(tmp_path, seed)
    for ckpt in rivals.parents:
        rivals.store.forget(ckpt)
    rivals.store.plan_gc().execute()
    assert rivals.pack.exists()
    packs = LocalBackend(Path(rivals.store.path))
    records = list(read_pack(packs, f"packs/{rivals.pack.name}"))
    changed_at(rivals.pack, max(records, key=lambda record: record.length).offset + 40)
    plan = Store.open(rivals.store.path).plan_repair()
    assert [lost.checkpoint for lost in plan.lost] == [rivals.one.id]
    plan.execute()
    rivals.store.plan_gc().execute()
    rivals.assert_whole(rivals.two)
