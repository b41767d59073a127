"""Bases that are moved, changed, truncated or invalid."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from msft_store import Base, BaseError, Checkpoint, Store, UnknownCheckpointError
from msft_store.cli.main import main
from tests.support.rot import changed_at
from tests.support.states import State, make_state, same_bits, train_step, write_base


def test_a_moved_base_is_reported_and_relocated(
    tmp_path: Path, store: Store, base: Base, ckpt: Checkpoint, state: State
) -> None:
    moved = Path(base.path).rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BaseError, match=rf"no longer at .*relocate {base.id[:12]}"):
        store.load(ckpt)
    meanwhile = store.save(train_step(state, 0.1, 5), parent=base)
    assert same_bits(store.load(meanwhile), train_step(state, 0.1, 5))
    report = store.examine(read_data=False)
    assert report.findings[0].base == base.id
    assert (report.sound, report.damaged) == ((meanwhile.id,), (ckpt.id,))
    store.relocate(base.id[:8], moved)
    for one in (store, Store.open(store.path)):
        assert same_bits(one.load(ckpt.id), train_step(state, 0.05, 1))
        assert one.check() == []


def test_relocating_to_another_model_is_refused(
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


def test_no_difference_is_saved_against_a_base_that_changed(
    store: Store, base: Base, state: State
) -> None:
    tensor = base.tensors["model.layers.1.up.weight"]
    changed_at(Path(base.path), tensor.offset + 6)
    for dtype in (torch.bfloat16, torch.float32):
        moved = {name: t.to(dtype) for name, t in train_step(state, 0.05, 1).items()}
        ckpt = store.save(moved, parent=base)
        assert same_bits(Store.open(store.path).load(ckpt), moved)


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
    """Return a safetensors file with any header."""
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
def test_false_safetensors_headers_are_refused(
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
def test_a_false_index_of_shards_is_refused(tmp_path: Path, store: Store, index: str) -> None:
    write_base(tmp_path / "b.safetensors", make_state())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BaseError, match="index"):
        store.add_base(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path, store: Store) -> None:
    for name in ("a", "b"):
        write_base(tmp_path / f"{name}.safetensors", {name: torch.ones(2)})
    index = tmp_path / "model.safetensors.index.json"
    wrong = {"a": "b.safetensors", "b": "b.safetensors"}
    for named in (wrong, {**wrong, "a": "a.safetensors", "absent": "a.safetensors"}):
        index.write_text(json.dumps({"weight_map": named}))
        with pytest.raises(BaseError, match=r"safetensors does not hold the tensor '(a|absent)'"):
            store.add_base(tmp_path)
    assert main(["--store", store.path, "import", str(tmp_path)]) == 1
    index.write_text(json.dumps({"weight_map": {n: f"{n}.safetensors" for n in ("a", "b")}}))
    assert store.add_base(tmp_path).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("variant", ["model.fp32.safetensors", "consolidated.safetensors"])
def test_variants_beside_the_file_that_transformers_reads_are_ignored(
    tmp_path: Path, store: Store, state: State, variant: str
) -> None:
    write_base(tmp_path / "model.safetensors", state)
    alone = store.add_base(tmp_path)
    write_base(tmp_path / variant, {name: t.float() for name, t in state.items()})
    (tmp_path / "model.safetensors.index.json").write_text("of shards that are no longer there")
    assert store.add_base(tmp_path).id == alone.id
    ckpt = store.save(state, parent=alone)
    files = store.export(ckpt, tmp_path / "out")
    assert [file.name for file in files] == ["model.safetensors"]


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


def test_an_open_store_follows_a_base_that_was_relocated_elsewhere(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    ckpt = store.save(state, parent=base)
    moved = Path(base.path).rename(tmp_path / "moved.safetensors")
    with pytest.raises(BaseError, match="no longer at"):
        store.load(ckpt)
    Store.open(store.path).relocate(base, moved)
    assert same_bits(store.load(ckpt), state)
    assert store.base(base.id).path == str(moved)


def test_an_open_store_knows_a_base_that_was_added_elsewhere(
    tmp_path: Path, store: Store, state: State
) -> None:
    added = Store.open(store.path).add_base(write_base(tmp_path / "base.safetensors", state))
    assert store.base(added.id) == added
    other = Store.open(store.path).add_base(write_base(tmp_path / "b.safetensors", make_state(1)))
    assert {base.id for base in store.bases()} == {added.id, other.id}
