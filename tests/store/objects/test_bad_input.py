"""Invalid input is refused with a clear message and without a loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msft_store import (
    Base,
    Checkpoint,
    InvalidInputError,
    NotAStoreError,
    OutOfSpaceError,
    StorageError,
    Store,
    StoreError,
    UnknownCheckpointError,
    VersionError,
)
from msft_store.format.layout import canonical_json, digest, seal
from msft_store.integrations.remote import clone, pull, push
from msft_store.objects.manifest import CheckpointFacts, checkpoint_content
from msft_store.storage.backend import LocalBackend
from msft_store.testing import FaultyBackend
from tests.support.rot import changed_at
from tests.support.states import State, train_step

EMPTY = checkpoint_content(
    CheckpointFacts.of(),
    parent=None,
    base=None,
    tensors=b"{}",
    logical_bytes=0,
)


def test_a_directory_without_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(NotAStoreError, match=r"no store at .*msft-store init"):
            Store.open(path)


def test_a_store_is_created_only_in_an_empty_directory(tmp_path: Path, store: Store) -> None:
    with pytest.raises(NotAStoreError, match="already"):
        Store.create(store.path)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(NotAStoreError, match="not empty"):
            Store.create(path)
    (tmp_path / "empty").mkdir()
    assert Store.create(tmp_path / "empty").log() == []
    with pytest.raises(StoreError):
        Store.create(tmp_path / "file" / "below")


def test_another_version_is_refused(store: Store) -> None:
    config = Path(store.path, "store.json")
    content = json.loads(config.read_bytes())
    del content["digest"]
    config.write_bytes(seal({**content, "version": 3}))
    with pytest.raises(VersionError, match="format version 3; this msft-store reads version 2 and"):
        Store.open(store.path)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\x00", b'{"format":"msft-store"}'])
def test_an_invalid_config_is_refused(store: Store, data: bytes) -> None:
    Path(store.path, "store.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"store\.json"):
        Store.open(store.path)


def test_the_nearest_checkpoint_is_shown(store: Store, ckpt: Checkpoint) -> None:
    almost = ckpt.id[:10] + "zz"
    with pytest.raises(UnknownCheckpointError, match=rf"the nearest is {ckpt.id} \(step 7\)"):
        store.load(almost)
    store.pin(ckpt, "best-arith")
    with pytest.raises(UnknownCheckpointError, match="the nearest is best-arith"):
        store.get("best-arit")


def test_an_empty_store_is_reported_as_empty(store: Store) -> None:
    with pytest.raises(UnknownCheckpointError, match="it holds none yet"):
        store.load("abcdef")


def test_a_short_or_ambiguous_prefix_is_refused(store: Store, ckpt: Checkpoint) -> None:
    assert store.get(ckpt.id[:4]) == ckpt
    with pytest.raises(UnknownCheckpointError, match="at least 4 characters"):
        store.get(ckpt.id[:3])
    with pytest.raises(UnknownCheckpointError):
        store.get("")
    seen: dict[str, int] = {}
    for step in range(5000):
        content = {**EMPTY, "step": step}
        first = seen.setdefault(digest(canonical_json(content))[:4], step)
        if first != step:
            break
    one, other = store.save({}, step=first), store.save({}, step=step)
    assert one.id[:4] == other.id[:4]
    with pytest.raises(UnknownCheckpointError, match="begins the ids of 2 checkpoints"):
        store.get(one.id[:4])
    assert store.get(one.id[:12]) == one


@pytest.mark.parametrize("name", ["../x", "a/../b", "/abs", "a//b", "a\n", "é", ".hidden"])
def test_names_of_refs_cannot_leave_the_store(store: Store, ckpt: Checkpoint, name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be the name of a ref"):
        store.pin(ckpt, name)
    with pytest.raises(StoreError):
        store.unpin(name)
    assert store.refs() == {}


def test_a_ref_is_not_named_like_the_id_of_another_object(
    store: Store, base: Base, ckpt: Checkpoint, state: State
) -> None:
    other = store.save(state, parent=base, step=8)
    for identity in (ckpt.id, base.id):
        for name in (identity, identity[:12], identity[:4]):
            with pytest.raises(InvalidInputError, match=f"the id {identity[:12]} begins with"):
                store.pin(other, name)
    assert store.refs() == {}
    store.pin(ckpt, ckpt.id[:8])
    store.pin(other, ckpt.id[:3])
    assert store.get(ckpt.id[:8]) == ckpt
    # A ref that was there first can still be moved, and shows the way back to its checkpoint.
    store.pin(other, ckpt.id[:8])
    assert store.get(ckpt.id[:8]) == other


def test_missing_refs_are_unknown(store: Store) -> None:
    with pytest.raises(UnknownCheckpointError, match="no ref 'x'"):
        store.unpin("x")


def test_a_full_disk_error_states_the_missing_bytes_and_loses_nothing(
    store: Store, base: Base, ckpt: Checkpoint, state: State
) -> None:
    backend = FaultyBackend(
        LocalBackend(Path(store.path)), error=OutOfSpaceError, kinds=frozenset({"write"})
    )
    full = Store(backend)
    backend.arm(2)
    with pytest.raises(OutOfSpaceError, match=r"needs up to \d+\.\d kB\. Nothing was saved"):
        full.save(train_step(state, 0.5, 3), parent=base)
    assert list(Path(store.path, "tmp").iterdir()) == []
    assert [one.id for one in store.log()] == [ckpt.id]
    backend.disarm()
    full.save(train_step(state, 0.5, 3), parent=base)
    assert full.check() == []


def test_an_export_goes_only_to_an_empty_directory(
    tmp_path: Path, store: Store, ckpt: Checkpoint
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for path in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(InvalidInputError, match="not empty"):
            store.export(ckpt, path)
    with pytest.raises(StoreError):
        store.export(ckpt, tmp_path / "full" / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "full", "store"]


def test_an_export_into_the_store_is_refused(
    tmp_path: Path, store: Store, ckpt: Checkpoint
) -> None:
    before = sorted(Path(store.path).rglob("*"))
    (tmp_path / "link").symlink_to(Path(store.path, "packs"))
    inside = [
        "store",
        "store/new",
        "store/packs/new",
        "link/new",
        "link/../new",
        "absent/../store/x",
    ]
    for path in inside:
        with pytest.raises(InvalidInputError, match="is inside the store"):
            store.export(ckpt, tmp_path / path)
    assert sorted(Path(store.path).rglob("*")) == before
    store.export(ckpt, tmp_path / "store-beside")


def test_no_other_store_is_made_inside_of_one(tmp_path: Path, store: Store) -> None:
    before = sorted(Path(store.path).rglob("*"))
    push(store, tmp_path / "remote")
    (tmp_path / "link").symlink_to(Path(store.path))
    for place in ("store/inner", "store/packs/inner", "link/inner"):
        for act in (
            Store.create,
            lambda path: push(store, path),
            lambda path: push(store, f"file://{path}"),
            lambda path: clone(tmp_path / "remote", path),
            lambda path: pull(store, tmp_path / "remote", with_base=True, base_directory=path),
        ):
            with pytest.raises(InvalidInputError, match="is inside the store"):
                act(tmp_path / place)
    for itself in ("store", "link"):
        with pytest.raises(InvalidInputError, match="is the store itself"):
            push(store, tmp_path / itself)
    assert sorted(Path(store.path).rglob("*")) == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"step": np.float64(3.0)}, "step"),
        ({"metadata": {3: "a"}}, "the key 3 is not a string"),
        ({"metadata": {"a": [{"b": ({None: 1},)}]}}, "the key None is not a string"),
        ({"tags": 3}, "tags must be a list"),
        ({"tags": (tag for tag in "ab")}, "tags must be a list"),
        ({"compared": 3}, "Resident.compare"),
        ({"compared": {("w", 0): 3}}, "Resident.compare"),
    ],
    ids=["step", "bool", "float", "key", "inner key", "tags", "generator", "compared", "change"],
)
def test_unsupported_tensors_are_refused_before_anything_is_written(
    store: Store, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidInputError, match=said):
        store.save({"w": torch.ones(1000)}, **wrong)
    assert not [path for path in Path(store.path).rglob("*") if path.suffix in (".pack", ".json")][
        1:
    ]


@pytest.mark.parametrize("names", ["model.scale", 3, [3]])
def test_names_are_a_collection_of_names(store: Store, ckpt: Checkpoint, names: Any) -> None:
    with pytest.raises(InvalidInputError, match="names are those of tensors"):
        store.load(ckpt, names=names)


@pytest.mark.parametrize("device", ["nowhere", "meta", [3]])
def test_a_device_that_holds_no_numbers_is_refused(
    store: Store, ckpt: Checkpoint, device: Any
) -> None:
    with pytest.raises(InvalidInputError, match="no device for tensors"):
        store.load(ckpt, device=device)


def test_a_note_is_a_mapping_and_a_policy_one(store: Store, ckpt: Checkpoint) -> None:
    note: Any = 3
    with pytest.raises(InvalidInputError, match="must be a mapping"):
        store.pin(ckpt, "best", note=note)
    with pytest.raises(InvalidInputError, match="retention policy"):
        store.plan_gc(note)


def test_a_store_can_be_created_where_its_creation_was_killed(tmp_path: Path) -> None:
    (tmp_path / "store" / "tmp").mkdir(parents=True)
    (tmp_path / "store" / "tmp" / "1-a").write_bytes(b"{")
    store = Store.create(tmp_path / "store")
    assert store.plan_gc().execute().freed_bytes == 1


@pytest.mark.parametrize("folder", ["refs", "refs/best", "packs", "tmp", "quarantine"])
def test_nothing_is_written_through_a_link_in_a_store(
    tmp_path: Path, store: Store, ckpt: Checkpoint, folder: str
) -> None:
    out, link = tmp_path / "elsewhere", Path(store.path, folder)
    shutil.rmtree(link, ignore_errors=True)
    out.mkdir()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(out)
    if folder == "quarantine":
        changed_at(Path(store.path, "manifests", f"{ckpt.id}.json"), -3)
        changed_at(Path(store.path, "manifests", f"{ckpt.id}.json"), -9)
    operations: dict[str, Callable[[], object]] = {
        "packs": lambda: store.save({"w": torch.ones(1000)}),
        "tmp": lambda: store.pin(ckpt, "last"),
        "quarantine": lambda: store.plan_repair().execute(),
    }
    with pytest.raises(StorageError, match="symbolic link"):
        operations.get(folder, lambda: store.pin(ckpt, "best/one"))()
    assert list(out.iterdir()) == []
