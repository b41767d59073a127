"""No payload is written before it has restored its chunk, and no reference is believed unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msft_store import Base, CorruptedError, Store
from msft_store.codec import codecs, compact_codec
from msft_store.codec.changes import ChunkChanges
from msft_store.codec.kernels import Bytes
from msft_store.format.dtypes import DType, dtype_by_name
from msft_store.objects import base_reader
from msft_store.tensors.bytes import to_bytes
from tests.support.states import State, same_bits, train_step, write_base


def farther(found: ChunkChanges) -> ChunkChanges:
    """Return changes of which the last has another distance."""
    symbols = found.symbols.copy()
    symbols[-1] ^= 4
    return replace(found, symbols=symbols)


def elsewhere(found: ChunkChanges) -> ChunkChanges:
    """Return changes of which the first quiet one comes an element later."""
    gaps = found.gaps.copy()
    gaps[0] += 1
    return replace(found, gaps=gaps)


def turned(found: ChunkChanges) -> ChunkChanges:
    """Return changes of which the first goes the other way."""
    symbols = found.symbols.copy()
    symbols[0] ^= 2
    return replace(found, symbols=symbols)


@pytest.mark.parametrize("fault", [farther, elsewhere, turned])
def test_a_payload_with_a_wrong_change_is_not_written(
    store: Store,
    base: Base,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[ChunkChanges], ChunkChanges],
) -> None:
    encode = compact_codec.encode
    monkeypatch.setattr(
        compact_codec,
        "encode",
        lambda found, layout, compiled: encode(fault(found), layout, compiled),
    )
    # Small payloads would otherwise be compared with those of another codec.
    monkeypatch.setattr(codecs, "_TABLES_PAY_FROM", 0)
    with pytest.raises(CorruptedError, match="did not restore"):
        store.save(train_step(state, 0.01, 1), parent=base)
    assert store.log() == []
    assert store.stats().stored_bytes == 0


@pytest.mark.parametrize("codec", [codecs.RAW, codecs.ZSTD, codecs.PLANES, codecs.TURNED])
def test_a_codec_without_a_reference_is_proven_too(
    store: Store, state: State, monkeypatch: pytest.MonkeyPatch, codec: codecs.Codec
) -> None:
    def encode(chunk: Bytes, reference: Bytes | None, dtype: DType, **_: object) -> Any:
        wrong = chunk.copy()
        wrong[-1:] ^= 1
        return codec, codec.encode(wrong, reference, dtype)

    monkeypatch.setattr(codecs, "encode", encode)
    with pytest.raises(CorruptedError, match="did not restore"):
        store.save(state)
    assert store.log() == []


@pytest.mark.parametrize("share", [0.001, 0.3])
def test_changes_that_are_known_give_the_same_payload(state: State, share: float) -> None:
    dtype = dtype_by_name("bfloat16")
    name = max(state, key=lambda name: state[name].nbytes)
    old, new = (to_bytes(s[name]) for s in (state, train_step(state, share, 1)))
    found = codecs.find_changes(new, old, dtype)
    assert found is not None
    for codec in (codecs.SPARSE, codecs.COMPACT):
        assert codec.encode(new, old, dtype, found) == codec.encode(new, old, dtype)
    assert codecs.encode(new, old, dtype, found=found) == codecs.encode(new, old, dtype)


class Files:
    """Stamps of files that change exactly when a test writes, and reads that a test interrupts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version = 0
        self.before_read: Callable[[], None] | None = None
        self.after_read: Callable[[], None] | None = None
        self._read = base_reader.read_file_into
        monkeypatch.setattr(base_reader, "file_stamp", lambda _: (self.version,))
        monkeypatch.setattr(base_reader, "read_file_into", self.read)

    def read(self, path: str, offset: int, target: memoryview) -> int:
        before, self.before_read = self.before_read, None
        if before is not None:
            before()
        got = self._read(path, offset, target)
        after, self.after_read = self.after_read, None
        if after is not None:
            after()
        return got


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(monkeypatch)


@pytest.mark.parametrize("moment", ["between saves", "before_read", "after_read"])
def test_a_base_that_is_rewritten_is_noticed(
    store: Store, base: Base, state: State, files: Files, moment: str
) -> None:
    moved = train_step(state, 0.05, 1)
    first = store.save(moved, parent=base)
    assert 0 < first.stored_bytes < sum(tensor.nbytes for tensor in moved.values()) / 2

    def rewrite() -> None:
        write_base(Path(base.path), train_step(state, 0.3, 9))
        files.version += 1

    if moment == "between saves":
        rewrite()
    else:
        setattr(files, moment, rewrite)
    again = train_step(state, 0.05, 2)
    ckpt = store.save(again, parent=base)
    assert files.version == 1
    if moment != "between saves":
        # Chunks that were read before may be stored as differences from the base as it was.
        write_base(Path(base.path), state)
    assert same_bits(Store.open(store.path).load(ckpt), again)


def test_a_base_that_did_not_change_is_not_hashed_again(
    store: Store, base: Base, state: State, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(train_step(state, 0.05, 1), parent=base)
    hashed = []
    monkeypatch.setattr(base_reader, "chunk_key", lambda data, _: hashed.append(data))
    again = train_step(state, 0.05, 2)
    ckpt = store.save(again, parent=base)
    assert hashed == []
    monkeypatch.undo()
    assert same_bits(store.load(ckpt), again)
