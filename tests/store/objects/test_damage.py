"""Every change of bytes is an error, never wrong numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msft_store import Base, Checkpoint, CorruptedError, Store, StoreError
from tests.support.hostile import Manifest
from tests.support.rot import changed_at
from tests.support.states import State, same_bits, train_step


def sampled(path: Path, count: int = 24) -> list[int]:
    size = path.stat().st_size
    return sorted({size * i // count for i in range(count)} | {size - 1})


@pytest.mark.parametrize("what", ["packs", "manifests", "refs", "bases"])
def test_a_flipped_bit_anywhere_is_an_error_never_other_numbers(
    store: Store, ckpt: Checkpoint, state: State, what: str
) -> None:
    store.pin(ckpt, "only")
    expected = train_step(state, 0.05, 1)
    (path,) = Path(store.path, what).iterdir()
    whole = path.read_bytes()
    noticed = 0
    for offset in sampled(path):
        changed_at(path, offset)
        try:
            loaded = Store.open(store.path).load("only")
        except StoreError:
            noticed += 1
            assert Store.open(store.path).check(read_data=True)
        else:
            # This bit holds no content: padding, or an unused bit of a frame's header.
            assert same_bits(loaded, expected)
        path.write_bytes(whole)
    assert noticed > 10
    assert Store.open(store.path).check() == []


def test_a_damaged_chunk_is_reported_with_checkpoint_and_tensor(
    store: Store, ckpt: Checkpoint
) -> None:
    (pack,) = Path(store.path, "packs").iterdir()
    changed_at(pack, 40)
    with pytest.raises(CorruptedError, match=rf"checkpoint {ckpt.id[:12]}, tensor '"):
        store.load(ckpt)
    findings = store.check()
    # The first chunk in the pack is that of the tied tensor.
    assert [finding.where for finding in findings] == [
        f"checkpoint {ckpt.id[:12]}, tensor {name}"
        for name in ("lm_head.weight", "model.embed.weight")
    ]
    assert all(str(pack) in finding.what for finding in findings)
    assert {(f.checkpoint, f.kind, f.file) for f in findings} == {(ckpt.id, "chunk", str(pack))}
    assert store.check(read_data=False) == []


def test_sound_checkpoints_are_listed_and_can_be_loaded(
    store: Store, ckpt: Checkpoint, base: Base, state: State
) -> None:
    other = train_step(state, 0.05, 2)
    sound = store.save(other, parent=base, step=8)
    store.pin(ckpt, "bad")
    store.pin(sound, "good")
    changed_at(Path(store.path, "manifests", f"{ckpt.id}.json"), 30)
    changed_at(Path(store.path, "refs", "bad.json"), 30)
    again = Store.open(store.path)
    for read_data in (True, False):
        report = again.examine(read_data)
        assert (report.sound, report.damaged) == ((sound.id,), (ckpt.id,))
        assert {finding.kind for finding in report.findings} == {"manifest", "ref"}
        assert str(report).startswith("1 of 2 checkpoints are sound: ")
    for name in ("good", sound.id, sound.id[:8]):
        assert same_bits(again.load(name), other)
    for name in ("bad", ckpt.id, ckpt.id[:8]):
        with pytest.raises(CorruptedError, match="msft-store repair"):
            again.load(name)


def test_a_pack_under_the_name_of_another_is_reported_and_read(
    store: Store, ckpt: Checkpoint, base: Base, state: State
) -> None:
    other = train_step(state, 0.05, 2)
    store.save(other, parent=base, step=8)
    one, two = sorted(Path(store.path, "packs").iterdir())
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    again = Store.open(store.path)
    assert [finding.kind for finding in again.check()] == ["pack", "pack"]
    assert same_bits(again.load(ckpt), train_step(state, 0.05, 1))


def test_without_the_record_of_its_base_a_checkpoint_is_not_sound(
    store: Store, ckpt: Checkpoint
) -> None:
    (path,) = Path(store.path, "bases").iterdir()
    changed_at(path, 60)
    for read_data in (True, False):
        report = Store.open(store.path).examine(read_data)
        assert report.damaged == (ckpt.id,)
        assert {finding.file for finding in report.findings} == {str(path)}


def test_a_save_reuses_no_damaged_chunk(
    store: Store, ckpt: Checkpoint, base: Base, state: State
) -> None:
    saved = train_step(state, 0.05, 1)
    child = train_step(saved, 0.05, 2)
    (pack,) = Path(store.path, "packs").iterdir()
    changed_at(pack, 40)
    below = Store.open(store.path).save(child, parent=ckpt.id, step=8)
    again = Store.open(store.path)
    assert again.examine().damaged == (ckpt.id,)
    assert same_bits(again.load(below), child)
    # Saving the same content again writes the damaged chunks again, for both checkpoints.
    other = again.save(saved, parent=base, step=9)
    again = Store.open(store.path)
    assert again.check() == []
    assert same_bits(again.load(other), saved)
    assert same_bits(again.load(ckpt), saved)


def test_saving_a_checkpoint_again_replaces_a_damaged_manifest(
    store: Store, ckpt: Checkpoint, base: Base, state: State
) -> None:
    path = Path(store.path, "manifests", f"{ckpt.id}.json")
    for offset in (30, path.stat().st_size - 30):
        changed_at(path, offset)
        for one in (store, Store.open(store.path)):
            assert one.save(train_step(state, 0.05, 1), parent=base, step=7).id == ckpt.id
        assert Store.open(store.path).check() == []


def test_damage_since_a_store_was_opened_is_found(store: Store, ckpt: Checkpoint) -> None:
    assert store.check() == []
    changed_at(Path(store.path, "manifests", f"{ckpt.id}.json"), 30)
    assert [finding.where for finding in store.check()] == [f"checkpoint {ckpt.id[:12]}"]


def test_a_lost_pack_is_reported(store: Store, ckpt: Checkpoint) -> None:
    (pack,) = Path(store.path, "packs").iterdir()
    pack.unlink()
    again = Store.open(store.path)
    assert again.check(read_data=False)
    for one in (store, again):
        with pytest.raises(CorruptedError, match="in no pack"):
            one.load(ckpt.id)


def test_a_ref_to_a_missing_checkpoint_is_reported(store: Store, ckpt: Checkpoint) -> None:
    store.pin(ckpt, "best")
    Path(store.path, "manifests", f"{ckpt.id}.json").unlink()
    (finding,) = Store.open(store.path).check()
    assert finding.where == "ref best"
    with pytest.raises(CorruptedError, match="points to a checkpoint that does not exist"):
        Store.open(store.path).load("best")


def forged(store: Store, ckpt: Checkpoint, change: Callable[[dict[str, Any]], None]) -> str:
    """Write a manifest with consistent digests and a changed tensor table; return its id."""
    folder = Path(store.path, "manifests")
    manifest = Manifest.read(folder / f"{ckpt.id}.json")
    change(manifest.table)
    return manifest.write(folder).stem


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model.scale"].update(shape=[2**40, 2**40]),
        lambda t: t["model.scale"].update(shape=[-1]),
        lambda t: t["model.scale"].update(shape="x"),
        lambda t: t["model.scale"].update(dtype="float7"),
        lambda t: t["model.scale"].update(dtype=["bool"]),
        lambda t: t["model.scale"].update(pieces=[]),
        lambda t: t["model.scale"].update(pieces=3),
        lambda t: t["model.scale"]["pieces"][0].update(chunks="zz"),
        lambda t: t["model.scale"]["pieces"][0].update(chunks=""),
        lambda t: t["model.scale"]["pieces"][0].update(chunks="00" * 16),
        lambda t: t["model.scale"]["pieces"][0].update(offset=[1]),
        lambda t: t["model.empty"].update(shape=[0, 2**80]),
        lambda t: t["model.empty"]["pieces"][0].update(shape=[0, 2**80]),
        lambda t: t.clear(),
        lambda t: t.update(more=t["model.scale"]),
        lambda t: t.update({"../../outside": t.pop("model.scale")}),
    ],
    ids=range(16),
)
def test_forged_manifests_are_store_errors(
    store: Store, ckpt: Checkpoint, change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    identity = forged(store, ckpt, change)
    again = Store.open(store.path)
    try:
        loaded = again.load(identity)
        again.export(identity, tmp_path / "out")
    except StoreError:
        assert again.check(read_data=False)
    else:
        assert "../../outside" in loaded
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert again.load(ckpt.id).keys() == store.load(ckpt).keys()


def test_strange_files_among_packs_are_no_packs(store: Store, ckpt: Checkpoint) -> None:
    Path(store.path, "packs", ".nfs000012").write_bytes(b"still open somewhere")
    again = Store.open(store.path)
    assert again.check() == []
    again.plan_gc().execute()
    assert again.load(ckpt.id)


def test_a_sealed_file_without_its_digest_is_refused(store: Store, ckpt: Checkpoint) -> None:
    store.pin(ckpt, "only")
    (path,) = Path(store.path, "refs").iterdir()
    content = json.loads(path.read_bytes())
    del content["digest"]
    path.write_text(json.dumps({**content, "note": {"score": float("nan")}}))
    with pytest.raises(CorruptedError, match="digest"):
        store.refs()


def test_a_base_under_another_name_is_refused(store: Store, ckpt: Checkpoint) -> None:
    (path,) = Path(store.path, "bases").iterdir()
    path.rename(path.with_name(f"{'0' * 32}.json"))
    (finding, *_) = Store.open(store.path).check()
    assert "does not hold the base that its name says" in str(finding)
    with pytest.raises(StoreError):
        Store.open(store.path).load(ckpt.id)
