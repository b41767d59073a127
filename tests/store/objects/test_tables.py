"""Tensor tables of version 2: what they take, what they need, and what damage to them does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from msft_store import Base, BaseError, Checkpoint, CorruptedError, Store, StoreError
from msft_store.cli.main import main
from msft_store.format.layout import compress_against, decompress, seal
from msft_store.format.mapping import NOTHING, BaseMapping
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import tensor_table
from msft_store.storage.backend import LocalBackend
from tests.support.plain_store import PlainStore
from tests.support.states import State, same_bits, train_step, write_base

COUNT = 120


def many(seed: int, prefix: str = "model.") -> State:
    """Return a model of many small tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}layers.{at}.mlp.weight": torch.randn(8, 6, generator=generator).bfloat16()
        for at in range(COUNT)
    }


@pytest.fixture
def big(tmp_path: Path, store: Store) -> Base:
    return store.add_base(write_base(tmp_path / "big.safetensors", many(0)))


def table_bytes(store: Store, ckpt: Checkpoint) -> int:
    """Return the bytes of a manifest without its first line."""
    data = manifest(store, ckpt).read_bytes()
    return len(data) - len(data.partition(b"\n")[0]) - 1


def manifest(store: Store, ckpt: Checkpoint) -> Path:
    return Path(store.path, "manifests", f"{ckpt.id}.json")


def test_a_tensor_that_equals_the_base_takes_next_to_nothing(store: Store, big: Base) -> None:
    state = many(0)
    assert table_bytes(store, store.save(state, parent=big)) < COUNT
    state["model.layers.7.mlp.weight"] = torch.zeros(8, 6).bfloat16()
    assert table_bytes(store, store.save(state, parent=big)) < COUNT
    # The key of each changed tensor cannot be compressed.
    assert 16 * COUNT < table_bytes(store, store.save(many(1), parent=big)) < 26 * COUNT


@pytest.mark.parametrize("prefix", ["", "module.model.", "net."])
def test_a_renamed_tensor_that_equals_the_base_takes_next_to_nothing(
    store: Store, big: Base, prefix: str
) -> None:
    state = many(0, prefix)
    ckpt = store.save(state, parent=big)
    assert table_bytes(store, ckpt) < 2 * COUNT
    assert same_bits(Store.open(store.path).load(ckpt), state)
    assert PlainStore(Path(store.path)).restore(ckpt.id).keys() == state.keys()
    catalog = Catalog(LocalBackend(Path(store.path)))
    names = {f"{prefix}{name.removeprefix('model.')}": name for name in many(0)}
    assert catalog.tables.mapping(ckpt) == BaseMapping(names=names, views={})


def test_the_prediction_follows_any_renaming(store: Store, big: Base, tmp_path: Path) -> None:
    state, tables = many(0), Catalog(LocalBackend(Path(store.path))).tables
    (first, second), names = list(state)[:2], {}
    names |= {first: second, second: first, "tied": list(state)[5], "twin": list(state)[5]}
    entries = store.tensors(store.save(state, parent=big))
    renamed = {name: entries[names.get(name, name)] for name in (*state, "tied", "twin")}
    table = tensor_table(renamed)
    encoded = tables.encode(table, big.id, BaseMapping(names=names, views={}))
    assert encoded.frames[0][0] < 120
    assert encoded.frames[1][0] < 90
    plain = tables.encode(table, big.id, NOTHING)
    assert plain.frames[0] == (0, 0)
    assert plain.frames[1][1] == len(table)


def test_a_table_of_any_length_reaches_back_to_its_dictionary() -> None:
    rng = np.random.default_rng(0)
    dictionary = rng.bytes(3 << 20)
    frame = compress_against(dictionary, dictionary)
    assert len(frame) < 1000
    assert decompress(frame, len(dictionary), dictionary) == dictionary
    with pytest.raises(ValueError, match="another length"):
        decompress(frame, len(dictionary) - 1, dictionary)


def test_a_manifest_whose_base_has_no_record_says_which_base_it_needs(
    tmp_path: Path, store: Store, big: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, other = store.save(many(1), parent=big), store.save({"x": torch.ones(3)})
    Path(store.path, "bases", f"{big.id}.json").unlink()
    again = Store.open(store.path)
    assert [one.id for one in again.log()] == [ckpt.id, other.id]
    with pytest.raises(BaseError, match=rf"{ckpt.id}.*base {big.id[:12]}.*add-base PATH"):
        again.load(ckpt)
    (finding,) = again.check()
    assert (finding.kind, finding.base, finding.checkpoint) == ("base", big.id, ckpt.id)
    with pytest.raises(StoreError, match=big.id[:12]):
        again.plan_gc()
    # A repair keeps the checkpoint, and cuts what was appended to its manifest.
    assert not again.plan_repair().needed
    whole = manifest(store, ckpt).read_bytes()
    manifest(store, ckpt).write_bytes(whole + b"more")
    assert main(["--store", store.path, "repair"]) == 0
    assert "waiting" in capsys.readouterr().out
    assert manifest(store, ckpt).read_bytes() == whole
    Store.open(store.path).add_base(tmp_path / "big.safetensors")
    assert same_bits(Store.open(store.path).load(ckpt), many(1))


def cut(data: bytes) -> bytes:
    return data[:-1]


def grown(data: bytes) -> bytes:
    return data + b"\n"


def swapped(data: bytes) -> bytes:
    """Give the frame of the mapping to the table, and the reverse."""
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    head["frames"] = head["frames"][::-1]
    del head["digest"]
    return seal(head) + b"\n" + rest


def without_table(data: bytes) -> bytes:
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    head["frames"][1] = [0, 0]
    del head["digest"]
    return seal(head) + b"\n" + rest[: head["frames"][0][0]]


@pytest.mark.parametrize("damage", [cut, grown, swapped, without_table])
def test_damage_to_the_frames_is_named(
    store: Store, big: Base, damage: Callable[[bytes], bytes]
) -> None:
    ckpt = store.save(many(1, "net."), parent=big)
    path = manifest(store, ckpt)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = Store.open(store.path)
    with pytest.raises(CorruptedError, match=ckpt.id):
        again.load(ckpt)
    (finding,) = again.check()
    assert (finding.kind, finding.checkpoint) == ("manifest", ckpt.id)
    with pytest.raises(CorruptedError, match=ckpt.id):
        again.plan_gc().execute()
    main(["--store", store.path, "repair"])
    kept = Store.open(store.path).log()
    assert kept == ([ckpt] if damage is grown else [])


def test_random_damage_to_the_frames_gives_errors_or_the_same_tensors(
    store: Store, big: Base
) -> None:
    ckpt = store.save(many(1, "net."), parent=big)
    path, rng = manifest(store, ckpt), np.random.default_rng(3)
    whole, expected = path.read_bytes(), store.tensors(ckpt)
    at, refused = whole.index(b"\n") + 1, 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(at, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        tables = Catalog(LocalBackend(Path(store.path))).tables
        try:
            assert tables.read(ckpt) == expected
        except CorruptedError:
            refused += 1
    assert refused > 120


def test_keys_are_read_without_parsing_each_table(
    store: Store, big: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [store.save(many(seed), parent=big) for seed in (1, 2)]
    catalog = Catalog(LocalBackend(Path(store.path)))
    expected = [
        b"".join(key for entry in catalog.tensors(c).values() for key, _ in entry.chunks())
        for c in saved
    ]
    monkeypatch.setattr("msft_store.objects.tables.parse_table", None)
    assert [catalog.keys(ckpt).tobytes() for ckpt in saved] == expected


def test_a_listing_reads_first_lines_only(store: Store, big: Base) -> None:
    ckpt = store.save(many(1), parent=big)
    path = manifest(store, ckpt)
    path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n")
    assert Store.open(store.path).log() == [ckpt]


def test_the_sizes_of_manifests_are_counted(
    store: Store, ckpt: Checkpoint, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    other = store.save(train_step(state, 0.5, 2), parent=ckpt)
    sizes = [manifest(store, one).stat().st_size for one in (ckpt, other)]
    assert [store.manifest_bytes(one) for one in (ckpt, other)] == sizes
    assert store.manifest_bytes() == store.stats().manifest_bytes == sum(sizes)
    for name, size in (("inspect", sum(sizes)), (f"inspect {ckpt.id}", sizes[0])):
        assert main(["--store", store.path, *name.split(), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["manifest_bytes"] == size
        assert main(["--store", store.path, *name.split()]) == 0
        assert "manifest" in capsys.readouterr().out
