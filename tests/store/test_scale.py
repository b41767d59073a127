"""Stores of many checkpoints: arrays of keys, packs that are read late, long lineages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msft_store import Base, Store
from msft_store.cli.main import main
from msft_store.errors import CorruptedError
from msft_store.format.dtypes import dtype_by_name
from msft_store.format.key_table import (
    KeyScanner,
    KeyTable,
    count_keys,
    is_among,
    key_at,
    unique_keys,
    view_keys,
)
from msft_store.format.layout import BaseSpan, ChunkSpan, Record
from msft_store.format.pack_footer import decode_footer, decode_trailer, encode_footer
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import Piece, TensorEntry, tensor_table
from msft_store.storage.backend import LocalBackend
from msft_store.testing import ALL_OPERATIONS, FaultyBackend
from tests.support.states import State, make_state, train_step

BF16 = dtype_by_name("bfloat16")


def some_keys(count: int, seed: int = 0) -> list[bytes]:
    generator = np.random.default_rng(seed)
    return [generator.bytes(16) for _ in range(count)]


@pytest.mark.parametrize("same_half", [b"", bytes(8)], ids=["digests", "equal halves"])
def test_keys_in_arrays_are_like_keys_in_dictionaries(same_half: bytes) -> None:
    # Keys with an equal first half are still distinguished.
    keys = [key[: 16 - len(same_half)] + same_half for key in some_keys(300)]
    drawn = [keys[at] for at in np.random.default_rng(1).integers(200, size=1000)]
    array = view_keys(b"".join(drawn))
    assert {key_at(unique_keys(array), row) for row in range(len(unique_keys(array)))} == set(drawn)
    distinct, times = count_keys(array)
    assert {key_at(distinct, row): int(n) for row, n in enumerate(times)} == {
        key: drawn.count(key) for key in drawn
    }
    assert is_among(view_keys(b"".join(keys)), array).tolist() == [key in drawn for key in keys]


def test_of_equal_keys_the_preferred_counts() -> None:
    generator, few = np.random.default_rng(2), some_keys(50)
    keys = [few[at] for at in generator.integers(50, size=400)]
    size = generator.integers(5, size=400)
    best: dict[bytes, int] = {}
    for value, key in sorted(enumerate(keys), key=lambda pair: (size[pair[0]], pair[0])):
        best.setdefault(key, value)
    table = KeyTable(view_keys(b"".join(keys)), np.arange(400), (size,))
    assert table.find(view_keys(b"".join(keys))).tolist() == [best[key] for key in keys]
    assert [table.get(key) for key in keys] == [best[key] for key in keys]
    assert table.get(bytes(16)) == -1
    assert table.find(view_keys(bytes(16))).tolist() == [-1]
    assert KeyTable(view_keys(b""), np.arange(0)).find(view_keys(bytes(16))).tolist() == [-1]


def table_of(names: list[str], seed: int) -> tuple[bytes, list[bytes]]:
    """Return a tensor table, and its keys in their order."""
    keys = dict(zip(sorted(names), some_keys(len(names), seed), strict=True))
    entries = {
        name: TensorEntry(
            dtype=BF16, shape=(4,), pieces=(Piece(offset=(0,), shape=(4,), keys=(key,)),)
        )
        for name, key in keys.items()
    }
    return tensor_table(entries), list(keys.values())


@pytest.mark.parametrize("names", [["w", "x.y"], ["chunks", "pieces"], []])
def test_keys_are_found_where_the_table_before_had_them(names: list[str]) -> None:
    scanner = KeyScanner()
    for seed in range(3):
        table, keys = table_of(names, seed)
        found = scanner.scan(table)
        if found is not None:
            assert found.tobytes() == b"".join(keys)
    other, keys = table_of([*names, "z"], 9)
    found = scanner.scan(other)
    assert found is None or found.tobytes() == b"".join(keys)


@pytest.mark.parametrize(
    "change",
    [
        (b'"chunks":', b'"chunks": '),
        (b'"chunks"', b'"\\u0063hunks"'),
        (b'"chunks":"', b'"chunks":" '),
        (b'"chunks":"', b'"chunks":"zz'),
    ],
)
def test_a_table_that_is_not_plain_is_left_to_the_parser(change: tuple[bytes, bytes]) -> None:
    scanner = KeyScanner()
    table, keys = table_of(["v", "w"], 0)
    scanner.scan(table)
    assert scanner.scan(table.replace(*change, 1)) is None
    # The length stays the same, with other bytes in the place of a key.
    at = table.index(keys[1].hex().encode())
    assert scanner.scan(table[:at] + b" \t" + table[at + 2 :]) is None
    found = scanner.scan(table)
    assert found is not None
    assert found.tobytes() == b"".join(keys)


def test_names_that_look_like_tables_lose_no_chunk(store: Store, state: State) -> None:
    names = ['x","chunks":"', '"chunks":"00"', "chunks", "\N{SNOWMAN}", "back\\slash"]
    tensors = dict(zip(names, list(state.values())[2:7], strict=True))
    ckpt = store.save(tensors)
    catalog = Catalog(LocalBackend(Path(store.path)))
    catalog.refresh()
    entries = catalog.tensors(ckpt)
    wanted = {key for entry in entries.values() for piece in entry.pieces for key in piece.keys}
    found = catalog.keys(ckpt)
    assert {key_at(found, row) for row in range(len(found))} == wanted


def test_a_footer_gives_back_its_records() -> None:
    keys = some_keys(5)
    references = [
        None,
        BaseSpan(tensor="w", start=3, box=((0, 1), (2, 2))),
        (ChunkSpan(key=keys[0], start=0, length=8), ChunkSpan(key=keys[1], start=2, length=6)),
    ]
    records = [
        Record(
            key=key,
            offset=16 + at,
            length=1,
            size=14,
            codec=4,
            dtype=BF16.code,
            depth=1,
            base=None if at == 0 else f"{at:032x}",
            ref_key=keys[-1],
            reference=references[at],
        )
        for at, key in enumerate(keys[:3])
    ]
    data, _ = encode_footer(records, 19)
    trailer = decode_trailer(data[-48:], 19 + len(data), "a pack")
    footer = decode_footer(data[: trailer.length], trailer, "a pack")
    assert list(footer) == records
    assert footer.refers_to_chunk.tolist() == [record.refers_to_chunk for record in records]
    data, _ = encode_footer(records, 18)
    trailer = decode_trailer(data[-48:], 18 + len(data), "a pack")
    with pytest.raises(CorruptedError, match="beyond its payloads"):
        decode_footer(data[: trailer.length], trailer, "a pack")


def test_listing_reads_no_pack(store: Store, base: Base, state: State) -> None:
    for seed in range(3):
        store.save(train_step(state, 0.1, seed), parent=base)
    for pack in Path(store.path, "packs").iterdir():
        pack.unlink()
    assert len(Store.open(store.path).log()) == 3


def test_packs_are_read_when_they_are_needed_even_after_a_failure(
    store: Store, base: Base, state: State
) -> None:
    changed = train_step(state, 0.1, 1)
    ckpt = store.save(changed, parent=base)
    backend = FaultyBackend(LocalBackend(Path(store.path)), kinds=ALL_OPERATIONS)
    opened = Store(backend)
    backend.arm(1)
    with pytest.raises(Exception, match="injected"):
        opened.load(ckpt.id)
    backend.disarm()
    assert opened.load(ckpt.id).keys() == changed.keys()


def test_a_long_lineage_is_shown_in_lines_of_bounded_length(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = None
    state = make_state()
    for step in range(60):
        parent = store.save({"w": state["model.scale"] + step}, parent=parent, step=step)
    assert main(["--store", store.path, "inspect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "└─" in line]) == 60
    assert max(map(len, lines)) < 160
