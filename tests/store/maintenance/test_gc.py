"""Gc frees space by a plan that can be printed first, and never deletes bytes that are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msft_store import (
    Base,
    Champions,
    CorruptedError,
    KeepBest,
    KeepLast,
    PinnedError,
    StorageError,
    Store,
    StoreError,
)
from msft_store.storage.backend import LocalBackend
from tests.support.quota import QuotaBackend, bytes_on_disk
from tests.support.states import State, same_bits, train_step, write_base


def files(store: Store) -> dict[str, int]:
    root = Path(store.path)
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def save_line(store: Store, base: Base, state: State, count: int) -> list[tuple[str, State]]:
    line = []
    for step in range(count):
        moved = train_step(state, 0.1, step)
        ckpt = store.save(moved, parent=base, step=step, metrics={"m": -abs(step - 1)})
        line.append((ckpt.id, moved))
    return line


def test_a_plan_lists_evictions_and_reasons_and_changes_nothing(
    store: Store, base: Base, state: State
) -> None:
    line = save_line(store, base, state, 4)
    store.pin(line[0][0], "first")
    before = files(store)
    plan = store.plan_gc(KeepLast(1) | KeepBest("m"))
    text = str(plan)
    assert files(store) == before
    assert f"forget   {line[2][0][:12]} step 2: no rule of the policy keeps it" in text
    assert f"{line[0][0][:12]} step 0: pinned as first" in text
    assert f"{line[1][0][:12]} step 1: best m (0)" in text
    assert f"{line[3][0][:12]} step 3: one of the last 1" in text
    result = plan.execute()
    assert result.freed_bytes > 0
    assert result.bytes == store.stats().on_disk_bytes
    assert [ckpt.id for ckpt in store.log()] == [line[i][0] for i in (0, 1, 3)]
    for i in (0, 1, 3):
        assert same_bits(store.load(line[i][0]), line[i][1])
    assert store.plan_gc().freed_bytes == 0


def test_without_a_policy_no_checkpoint_goes(store: Store, base: Base, state: State) -> None:
    line = save_line(store, base, state, 3)
    plan = store.plan_gc()
    assert (plan.dropped, plan.freed_bytes) == ((), 0)
    assert "would free 0 B" in str(plan)
    plan.execute()
    assert len(store.log()) == len(line)


def test_saving_and_forgetting_delete_no_data(store: Store, base: Base, state: State) -> None:
    line = save_line(store, base, state, 2)
    packs = {name: size for name, size in files(store).items() if name.startswith("packs")}
    store.forget(line[0][0])
    store.save(train_step(state, 0.1, 9), parent=line[1][0])
    assert packs.items() <= files(store).items()
    assert store.plan_gc().freed_bytes > 0


def test_a_pinned_checkpoint_is_neither_forgotten_nor_evicted(
    store: Store, base: Base, state: State
) -> None:
    line = save_line(store, base, state, 3)
    store.pin(line[0][0], "runs/best")
    with pytest.raises(PinnedError, match="pinned as runs/best"):
        store.forget(line[0][0])
    store.plan_gc(KeepLast(1)).execute()
    assert [ckpt.id for ckpt in store.log()] == [line[0][0], line[2][0]]
    assert store.get("runs/best").id == line[0][0]
    store.unpin("runs/best")
    store.forget(line[0][0])
    assert len(store.log()) == 1


def test_a_checkpoint_pinned_after_the_plan_stays(store: Store, base: Base, state: State) -> None:
    line = save_line(store, base, state, 3)
    plan = store.plan_gc(KeepLast(1))
    Store.open(store.path).pin(line[0][0], "late")
    plan.execute()
    assert [ckpt.id for ckpt in store.log()] == [line[0][0], line[2][0]]
    assert same_bits(store.load(line[0][0]), line[0][1])


def test_a_pack_needed_since_the_plan_stays(store: Store, base: Base, state: State) -> None:
    ((identity, moved),) = save_line(store, base, state, 1)
    store.forget(identity)
    plan = store.plan_gc()
    assert plan.delete
    again = Store.open(store.path).save(moved, parent=base, step=5)
    plan.execute()
    assert same_bits(store.load(again.id), moved)


def test_a_partly_dead_pack_is_rewritten(store: Store, base: Base, state: State) -> None:
    ((identity, moved),) = save_line(store, base, state, 1)
    part = {"model.layers.0.up.weight": moved["model.layers.0.up.weight"]}
    heir = store.save(part, parent=base)
    store.forget(identity)
    plan = store.plan_gc()
    assert (len(plan.rewrite), len(plan.delete)) == (1, 0)
    assert "rewrite" in str(plan)
    before = store.stats().on_disk_bytes
    result = plan.execute()
    assert result.peak_bytes > before - plan.freed_bytes
    assert store.stats().stored_bytes == heir.stored_bytes
    assert same_bits(store.load(heir), part)
    assert store.check() == []


def test_references_are_kept_until_no_delta_needs_them(
    store: Store, base: Base, state: State
) -> None:
    first = store.save(train_step(state, 0.3, 1), parent=base)
    moved = train_step(store.load(first), 0.02, 2)
    second = store.save(moved, parent=first)
    store.forget(first)
    plan = store.plan_gc()
    assert plan.held_bytes > 0
    assert "because others are stored as differences of them" in str(plan)
    plan.execute()
    assert same_bits(store.load(second), moved)
    store.anchor(second)
    assert store.plan_gc().execute().freed_bytes > 0
    assert store.plan_gc().held_bytes == 0
    assert same_bits(store.load(second), moved)
    store.forget(second)
    store.plan_gc().execute()
    assert store.stats().stored_bytes == 0


def test_leftovers_of_saves_that_never_ended_are_removed(store: Store, base: Base) -> None:
    left = Path(store.path, "tmp", "1-dead")
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(bytes(1000))
    plan = store.plan_gc()
    assert plan.freed_bytes == 1000
    assert "leftover tmp/1-dead (1.0 kB)" in str(plan)
    assert plan.execute().freed_bytes == 1000
    assert not left.exists()


@pytest.mark.parametrize("what", ["manifests", "packs", "refs", "bases"])
@pytest.mark.parametrize("cut", [20, None], ids=["truncated", "gone"])
def test_a_damaged_store_loses_nothing_more(
    store: Store, base: Base, state: State, what: str, cut: int | None
) -> None:
    line = save_line(store, base, state, 3)
    store.forget(line[0][0])
    store.pin(line[2][0], "last")
    path = max(Path(store.path, what).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = path.read_bytes()
    path.unlink()
    if cut is not None:
        path.write_bytes(whole[:-cut])
    elif what in ("manifests", "refs"):
        # That is how checkpoints are forgotten and refs dropped: nothing to complain about.
        path.write_bytes(b"")
    before = files(store)
    with pytest.raises(StoreError):
        Store.open(store.path).plan_gc().execute()
    assert files(store) == before
    path.write_bytes(whole)
    again = Store.open(store.path)
    assert again.plan_gc().execute().freed_bytes > 0
    assert same_bits(again.load(line[2][0]), line[2][1])


def test_a_pack_that_lost_its_end_is_not_copied(store: Store, base: Base, state: State) -> None:
    ((identity, moved),) = save_line(store, base, state, 1)
    store.save({"model.scale": torch.ones(1), **dict(list(moved.items())[:3])}, parent=base)
    store.forget(identity)
    plan = store.plan_gc()
    (waste,) = plan.rewrite
    pack = Path(store.path, waste.path)
    pack.write_bytes(pack.read_bytes()[:40])
    with pytest.raises(CorruptedError):
        plan.execute()
    assert pack.exists()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    store: Store, base: Base, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_line(store, base, state, 2)
    before = files(store)

    def scandir(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", scandir)
        with pytest.raises(StorageError, match="cannot list"):
            LocalBackend(Path(store.path)).list("manifests")
    assert files(store) == before


def test_a_policy_sees_checkpoints_of_a_store_as_one_branch(
    store: Store, base: Base, state: State
) -> None:
    line = save_line(store, base, state, 3)
    plan = store.plan_gc(Champions({"m": "max"}))
    assert [verdict.checkpoint.id for verdict in plan.kept] == [line[1][0]]


def test_evicting_an_invalid_checkpoint_deletes_nothing(store: Store) -> None:
    outside = Path(store.path, "..", "mine.json")
    outside.write_text("{}")
    store.evict(["../../mine", "0" * 32])
    assert outside.exists()


def test_a_checkpoint_without_a_base_survives_gc_though_a_base_has_its_reference(
    tmp_path: Path, store: Store, state: State
) -> None:
    changed = train_step(state, 0.05, 1)
    first = store.save(state, step=0)
    second = store.save(changed, step=1, parent=first)
    base = store.add_base(write_base(tmp_path / "same.safetensors", state))
    third = store.save(changed, step=2, parent=base)
    for ckpt in (first, second):
        store.forget(ckpt)
    store.plan_gc().execute()

    fourth = store.save(changed, step=3)

    for ckpt in (third, fourth):
        assert same_bits(store.load(ckpt), changed)
    assert store.check() == []


@pytest.mark.parametrize("deep", [False, True])
def test_a_chunk_whose_reference_was_freed_is_stored_again(store: Store, deep: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    first = {"x": torch.randn(500, generator=generator).bfloat16()}
    second = train_step(first, 0.1, 1)
    third = train_step(second, 0.1, 2) if deep else second
    large = torch.randn(50_000, generator=generator)
    line = [store.save(first)]
    if deep:
        line.append(store.save(second, parent=line[-1]))
    line.append(store.save({**third, "large": large}, parent=line[-1]))
    kept = store.save({"large": large})
    for ckpt in line:
        store.forget(ckpt)
    store.plan_gc().execute()
    assert store.stats().held_bytes == 0
    assert len(list(Path(store.path, "packs").iterdir())) == 1
    again = store.save({**third, "new": torch.ones(3)}, parent=kept)
    opened = Store.open(store.path)
    assert same_bits(opened.load(again, ["x"]), third)
    assert opened.check() == []
    opened.forget(kept)
    opened.plan_gc().execute()
    assert same_bits(opened.load(again, ["x"]), third)


def test_gc_on_a_full_disk_frees_all_that_needs_no_rewrite(
    store: Store, base: Base, state: State
) -> None:
    line = save_line(store, base, state, 3)
    part = {"model.layers.0.up.weight": line[0][1]["model.layers.0.up.weight"]}
    heir = store.save(part, parent=base)
    for identity, _ in line[:2]:
        store.forget(identity)
    root = Path(store.path)
    (root / "tmp" / "0-left").write_bytes(bytes(10))
    full = Store(QuotaBackend(root, quota=0))
    plan = full.plan_gc()
    assert (len(plan.delete), len(plan.rewrite), len(plan.leftovers)) == (1, 1, 1)
    result = plan.execute()
    assert result.freed_bytes >= plan.freed_bytes - plan.rewrite[0].dead_bytes > 0
    assert result.left_bytes == plan.rewrite[0].dead_bytes > 0
    assert "no space left" in str(result)
    assert result.bytes == full.stats().on_disk_bytes
    for identity, expected in ((heir.id, part), line[2]):
        assert same_bits(store.load(identity), expected)
    assert store.check() == []
    later = store.plan_gc().execute()
    assert (later.left_bytes, later.hindrance) == (0, None)
    assert later.freed_bytes > 0
    assert same_bits(store.load(heir.id), part)


def test_the_pack_that_takes_the_least_room_is_rewritten_first(
    store: Store, base: Base, state: State
) -> None:
    ids, some = [], [name for name in state if "up" in name]
    # Which of them comes first in the listing is chance; the larger has no room before the other.
    for seed, names in enumerate((some, some[:1])):
        moved = train_step(state, 0.3, seed)
        ids.append(store.save(moved, parent=base).id)
        store.save({name: moved[name] for name in names}, parent=base, step=seed)
    for identity in ids:
        store.forget(identity)
    plan = store.plan_gc()
    first, second = plan.rewrite
    assert first.live_bytes < second.live_bytes < first.live_bytes + first.dead_bytes
    root = Path(store.path)
    overhead = 900
    assert second.live_bytes > first.live_bytes + overhead
    quota = bytes_on_disk(root) + first.live_bytes + overhead
    assert Store(QuotaBackend(root, quota=quota)).plan_gc().execute().left_bytes == 0


def test_a_chunk_that_is_gone_is_found_before_anything_is_deleted(
    store: Store, base: Base, state: State
) -> None:
    (kept,) = save_line(store, base, state, 1)
    (pack,) = Path(store.path, "packs").iterdir()
    dropped = store.save(train_step(state, 0.1, 7), parent=base)
    pack.unlink()
    before = files(store)
    with pytest.raises(CorruptedError, match="gc deletes nothing from a damaged store"):
        Store.open(store.path).evict([dropped.id])
    assert files(store) == before
    assert {c.id for c in store.log()} == {kept[0], dropped.id}
