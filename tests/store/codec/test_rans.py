"""The range coder and its tables on their own, compiled and on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from msft_store.codec import rans
from tests.support.pairs import COMPILED, SEEDED

Array = NDArray[Any]

SIZES = (0, 1, 2, 3, 1023, 1024, 1025, 2047, 2048, 2049, 8 * 1024, 16 * 1024 - 1, 16 * 1024, 50_001)
HISTOGRAMS = {
    "one symbol": [5],
    "even": [1] * 256,
    "skewed": [1 << 20, 3, 1],
    "many rare": [1 << 21] + [1] * 255,
    "geometric": [1 << 20 - i for i in range(20)],
}


def tables_of(*rows: list[int]) -> Array:
    histogram = np.zeros((len(rows), 256), np.int64)
    for row, counts in zip(histogram, rows, strict=True):
        row[: len(counts)] = counts
    return histogram.reshape(-1)


def check_coder(symbols: Array, packed: Array) -> Array:
    """Assert that both implementations agree and read each other's words; return the words."""
    coders, slots = rans.count_coders(symbols.size), rans.build_slots(packed)
    words = rans.encode(symbols, packed, coders)
    if COMPILED is not None:
        inverse = COMPILED.invert_shares(packed)
        assert np.array_equal(COMPILED.encode_words(symbols, packed, inverse, coders), words)
        assert np.array_equal(COMPILED.build_slots(packed), slots)
    # The decoder reads beyond the words, and must ignore the bytes there.
    longer = np.concatenate([words, np.full(symbols.size + 1, 0xABCD, np.uint16)])
    contexts = (symbols >> 8).astype(np.uint8)
    results = [rans.decode(longer, contexts, packed, slots, coders)]
    if COMPILED is not None:
        results.append(COMPILED.decode(longer, contexts, packed, slots, coders))
    for decoded, used in results:
        assert np.array_equal(decoded, symbols & 255)
        assert used == words.size
    return words


@pytest.mark.parametrize("size", SIZES)
def test_symbols_of_several_contexts_are_restored(size: int) -> None:
    histogram = tables_of(*HISTOGRAMS.values())
    packed = rans.compute_frequencies(rans.compute_levels(histogram))
    rng = np.random.default_rng(size)
    for kinds in ([0], [3], range(len(HISTOGRAMS))):
        contexts = rng.choice(np.array(list(kinds)), size)
        counts = [len(rows) for rows in HISTOGRAMS.values()]
        symbols = rng.integers(0, np.array(counts)[contexts]) if size else contexts
        words = check_coder((contexts << 8 | symbols).astype(np.uint16), packed)
        if kinds == [0]:
            assert words.size == 2 * rans.count_coders(size)


def test_the_number_of_coders_is_a_power_of_two_that_grows_with_the_symbols() -> None:
    counts = [0, 1, 1023, 1024, 2047, 2048, 4095, 4096, 1 << 20, (1 << 20) - 1, 1 << 22]
    assert [rans.count_coders(n) for n in counts] == [0, 1, 1, 1, 1, 2, 2, 4, 1024, 512, 1024]


def test_skewed_symbols_take_about_their_entropy() -> None:
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.7, 1 << 16) - 1, 255).astype(np.uint16)
    histogram = np.bincount(symbols, minlength=256)
    share = histogram[histogram > 0] / symbols.size
    entropy = -(share * np.log2(share)).sum() * symbols.size / 16
    words = check_coder(symbols, rans.compute_frequencies(rans.compute_levels(histogram)))
    assert entropy < words.size < 1.01 * entropy + 2 * rans.count_coders(symbols.size)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0, 0, 1, 2, 100, 1 << 12, 1 << 21]), max_size=256), min_size=1
    )
)
@settings(SEEDED, max_examples=200)
def test_frequencies_sum_to_4096_and_leave_out_no_symbol(rows: list[list[int]]) -> None:
    histogram = tables_of(*rows)
    levels = rans.compute_levels(histogram)
    packed = rans.compute_frequencies(levels)
    shares, starts = packed.reshape(-1, 256) >> 16, packed.reshape(-1, 256) & 0xFFFF
    assert ((shares > 0) == (histogram.reshape(-1, 256) > 0)).all()
    occurs = histogram.reshape(-1, 256).any(axis=1)
    assert (shares.sum(axis=1) == np.where(occurs, 4096, 0)).all()
    assert (starts == np.where(shares > 0, np.cumsum(shares, axis=1) - shares, 0)).all()
    for slots in (
        rans.build_slots(packed),
        *([] if COMPILED is None else [COMPILED.build_slots(packed)]),
    ):
        expected = [np.repeat(np.arange(256), row) for row in shares[occurs]]
        assert np.array_equal(slots.reshape(-1, 4096)[occurs], np.array(expected).reshape(-1, 4096))
        assert not slots.reshape(-1, 4096)[~occurs].any()
    if COMPILED is not None:
        assert np.array_equal(COMPILED.compute_frequencies(levels), packed)


@given(levels=st.lists(st.integers(0, 49), min_size=256, max_size=256))
@settings(SEEDED, max_examples=100)
def test_arbitrary_levels_give_valid_tables(levels: list[int]) -> None:
    packed = rans.compute_frequencies(np.array(levels, np.uint8))
    assert (packed >> 16).sum() == (4096 if any(levels) else 0)
    if COMPILED is not None:
        assert np.array_equal(COMPILED.compute_frequencies(np.array(levels, np.uint8)), packed)


@pytest.mark.parametrize("rare", [1, 100, 255])
def test_rare_symbols_beside_a_frequent_one_leave_it_the_rest(rare: int) -> None:
    levels = np.array([49] + [1] * rare + [0] * (255 - rare), np.uint8)
    shares = rans.compute_frequencies(levels) >> 16
    assert shares[0] == 4096 - rare
    assert (shares[1 : 1 + rare] == 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_the_same_interpreted_and_compiled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1 + 10 ** int(rng.integers(1, 6)), (3, 256))
    counts[:, rng.random(256) < 0.7] = 0
    counts[2] = counts[1] * rng.random(256)
    runs, step = int(rng.integers(0, 1000)), int(rng.choice([1, 8]))
    plan = rans.plan_listing(counts, runs, step)
    _, busy, low, high = plan
    assert 0 <= low <= high < low + rans.MAX_CLASSES
    assert busy <= rans.EXPONENTS
    assert COMPILED is None or COMPILED.plan_listing(counts, runs, step) == plan
