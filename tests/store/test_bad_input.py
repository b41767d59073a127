"""A clear sentence, nothing lost, and never wrong numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msft_store import (
    Base,
    BaseError,
    Checkpoint,
    CorruptedError,
    InvalidInputError,
    NotAStoreError,
    OutOfSpaceError,
    Store,
    StoreError,
    UnknownCheckpointError,
    VersionError,
)
from msft_store.backend import LocalBackend
from msft_store.format import canonical, digest, seal
from msft_store.manifest import checkpoint_content
from tests.store.faults import FaultyBackend
from tests.store.states import State, make_state, same_bits, train_step, write_base

EMPTY = checkpoint_content(
    parent=None,
    base=None,
    step=None,
    metrics={},
    tags=(),
    metadata={},
    tensors=b"{}",
    logical_bytes=0,
)


@pytest.fixture
def ckpt(store: Store, base: Base, state: State) -> Checkpoint:
    return store.save(train_step(state, 0.05, 1), parent=base, step=7)


def changed_at(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


# Stores


def test_where_no_store_is_none_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(NotAStoreError, match=r"no store at .*msft-store init"):
            Store.open(path)


def test_a_store_is_created_only_where_nothing_is(tmp_path: Path, store: Store) -> None:
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
    config.write_bytes(seal({**content, "version": 2}))
    with pytest.raises(VersionError, match="format version 2; this msft-store reads version 1"):
        Store.open(store.path)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\x00", b'{"format":"msft-store"}'])
def test_a_store_file_that_is_none_is_refused(store: Store, data: bytes) -> None:
    Path(store.path, "store.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"store\.json"):
        Store.open(store.path)


# Names


def test_the_nearest_checkpoint_is_shown(store: Store, ckpt: Checkpoint) -> None:
    almost = ckpt.id[:10] + "zz"
    with pytest.raises(UnknownCheckpointError, match=rf"the nearest is {ckpt.id} \(step 7\)"):
        store.load(almost)
    store.pin(ckpt, "best-arith")
    with pytest.raises(UnknownCheckpointError, match="the nearest is best-arith"):
        store.get("best-arit")


def test_an_empty_store_says_that_it_is(store: Store) -> None:
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
        first = seen.setdefault(digest(canonical(content))[:4], step)
        if first != step:
            break
    one, other = store.save({}, step=first), store.save({}, step=step)
    assert one.id[:4] == other.id[:4]
    with pytest.raises(UnknownCheckpointError, match="stands for 2 checkpoints"):
        store.get(one.id[:4])
    assert store.get(one.id[:12]) == one


@pytest.mark.parametrize("name", ["../x", "a/../b", "/abs", "a//b", "a\n", "é", ".hidden"])
def test_names_of_refs_cannot_leave_the_store(store: Store, ckpt: Checkpoint, name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be the name of a ref"):
        store.pin(ckpt, name)
    with pytest.raises(StoreError):
        store.unpin(name)
    assert store.refs() == {}


def test_refs_that_are_not_there_are_unknown(store: Store) -> None:
    with pytest.raises(UnknownCheckpointError, match="no ref 'x'"):
        store.unpin("x")


# Bases


def test_a_base_that_moved_is_asked_for_and_relocated(
    tmp_path: Path, store: Store, base: Base, ckpt: Checkpoint, state: State
) -> None:
    moved = Path(base.path).rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BaseError, match=rf"no longer at .*relocate {base.id[:12]}"):
        store.load(ckpt)
    with pytest.raises(BaseError):
        store.save(train_step(state, 0.1, 5), parent=base)
    assert [finding.where[:4] for finding in store.check(read_data=False)] == ["base"]
    store.relocate(base.id[:8], moved)
    for one in (store, Store.open(store.path)):
        assert same_bits(one.load(ckpt.id), train_step(state, 0.05, 1))
        assert one.check() == []


def test_relocating_to_another_model_harms_neither(
    tmp_path: Path, store: Store, base: Base, ckpt: Checkpoint, state: State
) -> None:
    other_state = make_state(9)
    other = store.add_base(write_base(tmp_path / "other.safetensors", other_state))
    on_other = store.save(train_step(other_state, 0.1, 2), parent=other)
    for path in (other.path, tmp_path / "nowhere"):
        with pytest.raises(BaseError, match=r"wrong model|no safetensors"):
            store.relocate(base, path)
    again = Store.open(store.path)
    assert {b.id for b in again.bases()} == {base.id, other.id}
    assert same_bits(again.load(on_other.id), train_step(other_state, 0.1, 2))
    assert same_bits(again.load(ckpt.id), train_step(state, 0.05, 1))


def test_a_base_that_changed_is_named_with_its_tensor(
    store: Store, base: Base, ckpt: Checkpoint
) -> None:
    tensor = base.tensors["model.layers.1.up.weight"]
    changed_at(Path(base.path), tensor.offset + 6)
    with pytest.raises(BaseError) as raised:
        store.load(ckpt)
    for part in (base.path, "model.layers.1.up.weight", ckpt.id[:12], "changed"):
        assert part in str(raised.value)
    found = store.check(read_data=True)
    assert any(ckpt.id[:12] in f.where and "model.layers.1.up.weight" in f.where for f in found)


def test_nothing_is_saved_against_a_base_that_changed(
    store: Store, base: Base, state: State
) -> None:
    tensor = base.tensors["model.layers.1.up.weight"]
    changed_at(Path(base.path), tensor.offset + 6)
    for dtype in (torch.bfloat16, torch.float32):
        moved = {name: t.to(dtype) for name, t in train_step(state, 0.05, 1).items()}
        with pytest.raises(BaseError, match=r"changed.*model\.layers\.1\.up\.weight"):
            store.save(moved, parent=base)
    assert store.log() == []


def test_a_base_that_was_truncated_is_an_error_not_a_crash(
    store: Store, base: Base, ckpt: Checkpoint
) -> None:
    path = Path(base.path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BaseError, match="shorter"):
        store.load(ckpt)
    assert store.check(read_data=False)


def test_a_base_of_another_store_is_no_parent(tmp_path: Path, store: Store, state: State) -> None:
    other = Store.create(tmp_path / "other")
    base = other.add_base(write_base(tmp_path / "b.safetensors", state))
    with pytest.raises(UnknownCheckpointError, match="add_base"):
        store.save(state, parent=base)


def header(entries: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """Return a safetensors file with any header at all."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        header({}, length=1 << 62),
        header({}, length=1 << 26),
        header(b"not json"),
        header(b"[" * 100_000),
        header([1, 2]),
        header({"w": 3}),
        header(entry(dtype="F3")),
        header(entry(dtype=["F32"])),
        header(entry(dtype=None)),
        header(entry(shape=[4, -4])),
        header(entry(shape=[2**70, 4])),
        header(entry(shape="44")),
        header(entry(shape=[4.0, 4])),
        header(entry(data_offsets=[0, 640])),
        header(entry(data_offsets=[-64, 0])),
        header(entry(data_offsets=[64, 128])),
        header(entry(data_offsets=[0])),
        header(entry(data_offsets=[True, 65])),
        header({"w": {"dtype": "F32", "shape": []}}),
    ],
    ids=range(21),
)
def test_safetensors_headers_that_lie_are_refused(
    tmp_path: Path, store: Store, content: bytes
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(BaseError, match=r"bad\.safetensors"):
        store.add_base(path)
    assert store.bases() == []


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"w": "../b.safetensors"}}',
        '{"weight_map": {"w": "absent.safetensors"}}',
        '{"weight_map": {"w": ["b"]}}',
    ],
)
def test_an_index_of_shards_that_lies_is_refused(tmp_path: Path, store: Store, index: str) -> None:
    write_base(tmp_path / "b.safetensors", make_state())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BaseError, match="index"):
        store.add_base(folder)


def test_a_directory_without_weights_or_with_a_tensor_twice_is_no_base(
    tmp_path: Path, store: Store
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(BaseError, match=r"no \*\.safetensors"):
        store.add_base(folder)
    for name in ("a", "b"):
        write_base(folder / f"{name}.safetensors", {"w": torch.ones(2)})
    with pytest.raises(BaseError, match="'w' twice"):
        store.add_base(folder)


# Damage


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
            # Where nothing is kept: padding, or bits that a frame's header does not use.
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
    assert store.check(read_data=False) == []


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


def test_a_ref_to_nothing_is_reported(store: Store, ckpt: Checkpoint) -> None:
    store.pin(ckpt, "best")
    Path(store.path, "manifests", f"{ckpt.id}.json").unlink()
    (finding,) = Store.open(store.path).check()
    assert finding.where == "ref best"
    with pytest.raises(CorruptedError, match="points to a checkpoint that is not there"):
        Store.open(store.path).load("best")


def forged(store: Store, ckpt: Checkpoint, change: Callable[[dict[str, Any]], None]) -> str:
    """Write a manifest with consistent digests and a changed tensor table; return its id."""
    head, table = Path(store.path, "manifests", f"{ckpt.id}.json").read_bytes().split(b"\n")[:2]
    tensors, first = json.loads(table), json.loads(head)
    change(tensors)
    line = json.dumps(tensors, sort_keys=True, separators=(",", ":")).encode()
    del first["digest"]
    first["content"]["tensors"] = digest(line)
    content = json.dumps(first["content"], sort_keys=True, separators=(",", ":")).encode()
    first["id"] = digest(content)
    path = Path(store.path, "manifests", f"{first['id']}.json")
    path.write_bytes(seal(first) + b"\n" + line + b"\n")
    return str(first["id"])


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


# Space


def test_a_full_disk_says_how_much_is_needed_and_loses_nothing(
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


def test_an_export_goes_only_where_nothing_is(
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
