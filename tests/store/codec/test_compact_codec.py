"""Codecs 6 and 9 restore every bit, and both implementations give the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store import Store
from msft_store.codec import changes, codecs, compact_codec, exponent_codec
from msft_store.codec.changes import ChunkChanges
from msft_store.codec.compilation import NUMBA_VARIABLE
from msft_store.format import dtypes
from msft_store.format.dtypes import DType
from tests.support.pairs import (
    BF16,
    COMPILED,
    DTYPES,
    KINDS,
    PATHS,
    SEEDED,
    Pair,
    changed,
    check,
    layout,
    packed,
    pair_of,
)
from tests.support.plain_codecs import read_classes, read_compact
from tests.support.states import make_state, same_bits, train_step, write_base

CODECS = pytest.mark.parametrize("codec", [compact_codec, exponent_codec])


@CODECS
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
)
@settings(SEEDED, max_examples=300)
def test_both_implementations_give_the_same_bytes_and_restore_every_bit(
    *, codec: ModuleType, dtype: DType, count: int, kind: str, seed: int
) -> None:
    check(dtype, *pair_of(dtype, count, kind, seed), codec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_blocks_and_their_sampling_may_end_anywhere(dtype: DType, kind: str) -> None:
    for blocks in (1, 256):
        for count in (128 * blocks - 1, 128 * blocks, 128 * blocks + 1):
            check(dtype, *pair_of(dtype, count, kind, blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_a_reader_written_from_the_format_page_agrees(dtype: DType, kind: str) -> None:
    for count in (1, 200, 5000):
        new, old = pair_of(dtype, count, kind, count)
        for codec, read in ((compact_codec, read_compact), (exponent_codec, read_classes)):
            payload = check(dtype, new, old, codec)
            mantissa = layout(dtype).shift
            again = read(payload, old.tobytes(), mantissa=mantissa, width=dtype.lane)
            assert again == new.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_pytorch_and_compiled_kernels_find_the_same_changes(dtype: DType, kind: str) -> None:
    for count in (1, 129, 40_000):
        new, old = pair_of(dtype, count, kind, 3)
        one = exponent_codec.find_changes(new, old, layout(dtype), COMPILED)
        other = changes.find_changes(torch.from_numpy(new), torch.from_numpy(old), layout(dtype))
        assert one.listed is not None
        for compiled in PATHS:
            listed = exponent_codec.locate_listed(
                old, layout(dtype), one, one.gaps, compiled, count=one.symbols.size
            )
            assert np.array_equal(one.listed.positions, listed)
        assert np.array_equal(one.listed.references, old[listed].view(one.listed.values.dtype))
        assert np.array_equal(one.listed.values, new[listed].view(one.listed.values.dtype))
        one = replace(one, listed=None)
        for field in fields(ChunkChanges):
            first, second = getattr(one, field.name), getattr(other, field.name)
            assert (first is None) == (second is None), field.name
            assert np.array_equal(first, second), field.name


@pytest.mark.parametrize("compiled", PATHS, ids=["compiled", "reference"])
def test_unchanged_chunks_and_unaligned_addresses_are_coded(compiled: Any) -> None:
    dtype = dtypes.dtype_by_name("float32")
    new, old = pair_of(dtype, 3000, "trained", 1)
    shifted = []
    for lanes in (new, old):
        data = np.zeros(lanes.nbytes + 1, np.uint8)
        data[1:] = lanes.view(np.uint8)
        shifted.append(data[1:].view(lanes.dtype))
    assert not shifted[0].flags.aligned
    for now, was in (shifted, (old, old)):
        payload = packed(dtype, now, was, compiled)
        assert changed(payload, was, dtype, compiled).tobytes() == now.tobytes()


@pytest.fixture
def every_warning() -> Iterator[None]:
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize("compiled", PATHS, ids=["compiled", "reference"])
def test_read_only_arrays_stay_as_they_are_without_a_warning(compiled: Any) -> None:
    new, old = pair_of(BF16, 3000, "trained", 1)
    before = old.tobytes()
    for lanes in (new, old):
        lanes.flags.writeable = False
    payload = packed(BF16, new, old, compiled)
    assert changed(payload, old, BF16, compiled).tobytes() == new.tobytes()
    assert old.tobytes() == before


@pytest.mark.parametrize("compiled", PATHS, ids=["compiled", "reference"])
def test_threads_change_no_byte(compiled: Any) -> None:
    pairs = [pair_of(BF16, 20_000, kind, seed) for seed in range(3) for kind in KINDS]

    def code(pair: Pair) -> bytes:
        payload = packed(BF16, *pair, compiled)
        assert (changed(payload, pair[1], BF16, compiled) == pair[0]).all()
        return payload

    alone = [code(pair) for pair in pairs]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(code, pairs)) == alone
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stores_with_and_without_numba_are_equal_and_read_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    state = make_state(dtype=dtype)
    after = train_step(state, 0.05, 1)
    source = write_base(tmp_path / "base.safetensors", state)
    packs, saved = [], []
    for value in ("0", "1"):
        monkeypatch.setenv(NUMBA_VARIABLE, value)
        store = Store.create(tmp_path / value)
        saved.append(store.save(after, parent=store.add_base(source)).id)
        packs.append({path.name: path.read_bytes() for path in (tmp_path / value).glob("packs/*")})
    assert packs[0] == packs[1] != {}
    assert saved[0] == saved[1]
    for value in ("0", "1"):
        monkeypatch.setenv(NUMBA_VARIABLE, value)
        for written in ("0", "1"):
            assert same_bits(Store.open(tmp_path / written).load(saved[0]), after)


def test_a_chunk_near_its_reference_costs_less_than_as_gaps_and_changes() -> None:
    new, old = pair_of(BF16, 1 << 16, "trained", 1)
    mine, theirs = (
        codec.encode(new.view(np.uint8), old.view(np.uint8), BF16)
        for codec in (codecs.COMPACT, codecs.SPARSE)
    )
    assert len(mine) < len(theirs)


@pytest.mark.parametrize("compiled", PATHS, ids=["compiled", "reference"])
def test_references_of_zero_leave_the_others_their_classes(compiled: Any) -> None:
    new, old = pair_of(BF16, 1 << 16, "trained", 1)
    old[:2000] = 0
    found = exponent_codec.find_changes(new, old, layout(BF16), compiled)
    # The exponents of the other references are about 120.
    assert found.high > 100


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_new_values_of_every_size_are_restored(name: str) -> None:
    dtype = dtypes.dtype_by_name(name)
    values = np.append(np.arange(0, layout(dtype).mask, layout(dtype).mask // 999), [0, 1, 2, 3])
    for spread in (values, values[:9], values[-30:-4], values[-4:]):
        new = np.concatenate([spread, spread | layout(dtype).sign]).astype(f"<u{dtype.lane}")
        old = np.zeros_like(new)
        old[::3] = layout(dtype).sign
        signed = f"<i{dtype.lane}"
        check(dtype, new.view(signed), old.view(signed))


def test_many_symbols_are_shared_by_several_coders() -> None:
    check(BF16, *pair_of(BF16, 70_000, "all", 1))


def test_one_large_new_value_does_not_spoil_the_others() -> None:
    rng = np.random.default_rng(1)
    new = (rng.normal(0, 1e-5, 20_000).astype("<f4").view("<u4") >> 16).astype("<i2")
    old = np.zeros_like(new)
    alone = len(packed(BF16, new, old, COMPILED))
    new[77] = 0x4F00
    assert len(check(BF16, new, old)) < alone + 20


def test_values_from_zero_cost_less_than_as_distances() -> None:
    rng = np.random.default_rng(1)
    new = (rng.normal(0, 1e-5, 20_000).astype("<f4").view("<u4") >> 16).astype("<i2")
    old = np.zeros_like(new)
    mine, older = (
        len(packed(BF16, new, old, COMPILED, codec)) for codec in (compact_codec, exponent_codec)
    )
    assert mine < 0.85 * older
