"""Repair keeps sound files, recovers small ones and moves the others to quarantine."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from msft_store import (
    Base,
    Checkpoint,
    NotAStoreError,
    StorageError,
    Store,
    StoreError,
    VersionError,
)
from msft_store.cli.main import main
from msft_store.format.layout import seal
from msft_store.maintenance.repair.plan import plan_repair
from msft_store.storage.backend import LocalBackend
from tests.support.rot import changed_at
from tests.support.states import State, same_bits, train_step


@pytest.fixture
def other(store: Store, base: Base, state: State, ckpt: Checkpoint) -> Checkpoint:
    """A second checkpoint, in a pack of its own."""
    return store.save(train_step(state, 0.05, 2), parent=base, step=8)


def pack_of(store: Store, ckpt: Checkpoint) -> Path:
    """Return the pack that was written with a checkpoint."""
    packs = sorted(Path(store.path, "packs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return packs[[known.id for known in store.log()].index(ckpt.id)]


def torn(path: Path) -> None:
    """Destroy a file completely."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def mount_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every change of a file system as a read-only mount does."""
    real_open = os.open

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def open_to_read(path: str, flags: int, *args: int, **kwargs: int) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return refuse() if writes else real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_to_read)
    for name in ("mkdir", "unlink", "replace", "rename", "utime", "rmdir"):
        monkeypatch.setattr(os, name, refuse)


def test_sound_files_stay_and_the_others_move_to_quarantine(
    store: Store, ckpt: Checkpoint, other: Checkpoint, state: State
) -> None:
    store.pin(ckpt, "bad")
    store.pin(other, "good")
    pack, manifest = pack_of(store, ckpt), Path(store.path, "manifests", f"{ckpt.id}.json")
    torn(pack)
    damaged, listed = pack.read_bytes(), manifest.read_bytes()
    plan = store.plan_repair()
    assert plan.sound == (other.id,)
    assert [condition.checkpoint for condition in plan.lost] == [ckpt.id]
    result = plan.execute()
    assert result.folder is not None
    quarantine = Path(result.folder)
    assert result.files == 3
    assert (quarantine / "packs" / pack.name).read_bytes() == damaged
    assert (quarantine / "manifests" / manifest.name).read_bytes() == listed
    why = json.loads((quarantine / "why.json").read_bytes())
    assert set(why["files"]) == {
        *(f"packs/{pack.name}", f"manifests/{manifest.name}", "refs/bad.json")
    }
    assert list(why["checkpoints"]) == [ckpt.id]
    again = Store.open(store.path)
    assert again.refs() == {"good": other.id}
    assert same_bits(again.load(other), train_step(state, 0.05, 2))
    assert again.check() == []
    assert not again.plan_repair().needed
    assert again.stats().quarantine_bytes == result.bytes + (quarantine / "why.json").stat().st_size
    again.plan_gc().execute()
    assert (quarantine / "packs" / pack.name).read_bytes() == damaged


def test_another_representation_serves(store: Store, ckpt: Checkpoint, state: State) -> None:
    child = store.save(train_step(train_step(state, 0.05, 1), 0.05, 2), parent=ckpt, step=8)
    before = set(Path(store.path, "packs").iterdir())
    store.anchor(child)
    (anchored,) = set(Path(store.path, "packs").iterdir()) - before
    changed_at(anchored, 40)
    plan = store.plan_repair()
    assert set(plan.sound) == {ckpt.id, child.id}
    (pack,) = plan.packs
    assert 0 < len(pack.usable) < pack.records
    plan.execute()
    again = Store.open(store.path)
    assert same_bits(again.load(child), train_step(train_step(state, 0.05, 1), 0.05, 2))
    assert again.check() == []


@pytest.mark.parametrize("place", [3, 13, -1, -20, -30, -36, -44])
def test_damage_to_the_ends_of_a_pack_loses_nothing(
    store: Store, ckpt: Checkpoint, state: State, place: int
) -> None:
    pack = pack_of(store, ckpt)
    whole = pack.read_bytes()
    changed_at(pack, place % len(whole))
    assert store.examine().damaged == (ckpt.id,)
    store.plan_repair().execute()
    assert pack.read_bytes() == whole
    assert same_bits(Store.open(store.path).load(ckpt), train_step(state, 0.05, 1))


def test_appended_bytes_are_cut_off_a_manifest(store: Store, ckpt: Checkpoint) -> None:
    path = Path(store.path, "manifests", f"{ckpt.id}.json")
    written = path.read_bytes()
    path.write_bytes(written + b"x" * 40)
    store.plan_repair().execute()
    assert path.read_bytes() == written
    assert Store.open(store.path).check() == []


@pytest.mark.parametrize("place", [90, -9], ids=["first line", "tensor table"])
def test_a_flipped_bit_of_a_manifest_loses_its_checkpoint(
    store: Store, ckpt: Checkpoint, other: Checkpoint, place: int
) -> None:
    path = Path(store.path, "manifests", f"{ckpt.id}.json")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    plan = store.plan_repair()
    assert [condition.checkpoint for condition in plan.lost] == [ckpt.id]
    plan.execute()
    assert not path.exists()
    assert [known.id for known in Store.open(store.path).log()] == [other.id]


@pytest.mark.parametrize("spoil", [torn, Path.unlink], ids=["torn", "gone"])
def test_a_config_is_written_anew(
    store: Store, ckpt: Checkpoint, capsys: pytest.CaptureFixture[str], spoil: Callable[..., None]
) -> None:
    spoil(Path(store.path, "store.json"))
    with pytest.raises(StoreError):
        Store.open(store.path)
    assert main(["--store", store.path, "repair"]) == 0
    assert "store.json" in capsys.readouterr().out
    assert Store.open(store.path).check() == []


def test_a_ref_comes_back_without_its_note(store: Store, ckpt: Checkpoint) -> None:
    store.pin(ckpt, "best", note={"reasons": ["it is the best"]})
    path = Path(store.path, "refs", "best.json")
    path.write_bytes(path.read_bytes().replace(b"the best", b"a goose!"))
    store.plan_repair().execute()
    again = Store.open(store.path)
    assert again.refs() == {"best": ckpt.id}
    assert again.notes() == {"best": {}}


def test_checkpoints_of_a_missing_base_are_kept_until_it_is_found(
    store: Store, ckpt: Checkpoint, base: Base, state: State, tmp_path: Path
) -> None:
    Path(base.path).rename(tmp_path / "away")
    plan = store.plan_repair()
    assert [condition.checkpoint for condition in plan.waiting] == [ckpt.id]
    assert "relocate" in str(plan)
    assert not plan.needed
    torn(Path(store.path, "bases", f"{base.id}.json"))
    store.plan_repair().execute()
    again = Store.open(store.path)
    assert [known.id for known in again.log()] == [ckpt.id]
    assert again.add_base(tmp_path / "away").id == base.id
    assert same_bits(again.load(ckpt), train_step(state, 0.05, 1))
    assert again.check() == []


def test_the_record_of_a_base_is_written_anew(store: Store, ckpt: Checkpoint, base: Base) -> None:
    path = Path(store.path, "bases", f"{base.id}.json")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"shape"', b'"shale"'))
    assert store.examine().damaged == (ckpt.id,)
    store.plan_repair().execute()
    assert path.read_bytes() == whole


class BadMedium(LocalBackend):
    """A disk that fails every read of one byte of a file."""

    def __init__(self, root: str, path: Path, offset: int, number: int) -> None:
        super().__init__(Path(root))
        self.bad, self.offset, self.number = path, offset, number

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        end = offset + length if length is not None else offset + self.size(path)
        if self.describe(path) == str(self.bad) and offset <= self.offset < end:
            raise StorageError("cannot read") from OSError(self.number, "injected")
        return super().read(path, offset, length)


def test_checkpoints_on_unreadable_sectors_are_lost_and_the_rest_is_kept(
    store: Store, ckpt: Checkpoint, other: Checkpoint
) -> None:
    backend = BadMedium(store.path, pack_of(store, ckpt), 60, errno.EIO)
    plan = plan_repair(backend)
    assert plan.sound == (other.id,)
    plan.execute()
    again = Store.open(store.path)
    assert again.check() == []
    assert [known.id for known in again.log()] == [other.id]


def test_a_pack_that_may_not_be_read_is_not_given_up(
    store: Store, ckpt: Checkpoint, other: Checkpoint
) -> None:
    backend = BadMedium(store.path, pack_of(store, ckpt), 60, errno.EACCES)
    with pytest.raises(StorageError):
        plan_repair(backend)
    assert Store.open(store.path).check() == []


def test_a_store_of_a_newer_version_is_refused(store: Store, ckpt: Checkpoint) -> None:
    config = Path(store.path, "store.json")
    content = json.loads(config.read_bytes())
    del content["digest"]
    config.write_bytes(seal({**content, "version": 3}))
    with pytest.raises(VersionError):
        plan_repair(LocalBackend(Path(store.path)))


def test_a_repair_is_planned_on_a_file_system_that_is_mounted_read_only(
    store: Store,
    ckpt: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at, before = ["--store", store.path], sorted(Path(store.path).rglob("*"))
    with monkeypatch.context() as context:
        mount_read_only(context)
        for dry in (["gc"], ["repack"], ["forget", ckpt.id], ["repair"]):
            assert main([*at, *dry, "--dry-run"]) == 0
    torn(pack_of(store, ckpt))
    mount_read_only(monkeypatch)
    capsys.readouterr()
    assert main([*at, "repair", "--dry-run"]) == 0
    assert "lost     checkpoint" in capsys.readouterr().out
    assert main([*at, "repair"]) == 1
    assert "Read-only file system" in capsys.readouterr().err
    assert sorted(Path(store.path).rglob("*")) == before


def test_nothing_is_repaired_where_no_store_is(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        plan_repair(LocalBackend(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotAStoreError, match="no store"):
        plan_repair(LocalBackend(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_the_commands_report_sound_checkpoints_and_their_actions(
    store: Store, ckpt: Checkpoint, other: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--store", store.path]
    torn(pack_of(store, ckpt))
    assert main([*at, "check"]) == 3
    text = capsys.readouterr().out
    assert "1 of 2 checkpoints are sound" in text
    assert "msft-store repair" in text
    assert main([*at, "check", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["sound"], report["damaged"]) == ([other.id], [ckpt.id])
    assert {"kind", "checkpoint", "tensor", "file", "where", "what"} <= report["findings"][0].keys()
    assert main([*at, "repair", "--dry-run"]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert main([*at, "repair", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [condition["id"] for condition in done["lost"]] == [ckpt.id]
    assert done["files"] == 2
    assert main([*at, "repair"]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert main([*at, "stats"]) == 0
    assert "quarantine" in capsys.readouterr().out
    assert main([*at, "check", "--read-data"]) == 0
