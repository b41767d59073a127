"""Find, list and apply changes by the reference's exponent; and codec 6, which is only read.

Codecs 6, 7 and 9 list the same elements and code the same symbols; ``docs/FORMAT.md``, section 5,
has the formats. Invariants: the result is the same with and without compiled kernels and on every
device, and a damaged payload is a :class:`ValueError`, never an access out of bounds.

Example::

    compiled = compiled_kernels()                     # or None without Numba
    changes = find_changes(new, old, layout, compiled)
    positions = locate_listed(old, layout, changes, changes.gaps, compiled, count=...)
    decode_in_place(payload, old, layout, compiled)   # old is now equal to new
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from msft_store.codec import changes, kernels, rans
from msft_store.codec.changes import (
    EXTRA_BITS,
    FIRST_CLASS,
    GAP_CONTEXT,
    RUN_CONTEXT,
    SMALLEST,
    ChunkChanges,
    FloatLayout,
    Listed,
    Listing,
)
from msft_store.codec.kernels import Lanes
from msft_store.codec.rans import BLOCK, EXPONENTS, MAX_CLASSES, SYMBOLS
from msft_store.format.layout import decompress

Array = NDArray[Any]

_HEADER = struct.Struct("<IIIIIBBH")
"""Counts of listed lanes, gaps and runs; bytes of the first part; words of low bits; low, high,
busy."""
ALL_BLOCKS_CODED = 1 << 15
"""The bit of ``busy`` that is set if all blocks are coded."""
Tokens = tuple[Array, Array]
"""The number of low bits of each token, and the smallest value that it stands for."""


class SymbolReader(Protocol):
    """Reads the symbols of a payload from its parts before and after the low bits."""

    tokens: Tokens

    def __init__(self, first: bytes, rest: bytes, low: int, high: int, compiled: Any) -> None: ...

    def read_runs_and_gaps(self, contexts: Array) -> Array:
        """Return the symbols of runs and gaps, given their contexts."""

    def read_changes(self, exponents: Array) -> Array:
        """Return the symbols of changes, given their references' exponents; nothing is left."""


def find_changes(new: Lanes, old: Lanes, layout: FloatLayout, compiled: Any) -> ChunkChanges:
    """Return the changes, found by compiled kernels or, with ``None``, by PyTorch."""
    if compiled is None:
        return changes.find_changes(_as_tensor(new), _as_tensor(old), layout)
    unsigned = f"<u{new.itemsize}"
    now, was = _as_read_only(new.view(unsigned)), _as_read_only(old.view(unsigned))
    step = rans.sampling_step(-(-new.size // BLOCK))
    busy, low, high, skip, (runs, gaps, symbols, distances), listed = compiled.find_changes(
        now, was, layout.shift, layout.mask, layout.fine, step
    )
    positions, references, values = listed
    return ChunkChanges(
        busy=busy,
        low=low,
        high=high,
        runs=runs if skip else None,
        gaps=gaps,
        symbols=symbols,
        distances=distances,
        listed=Listed(positions=positions, references=references, values=values),
    )


def list_runs_and_gaps(found: ChunkChanges) -> tuple[Array, Array]:
    """Return the symbols of runs and gaps (uint16, with contexts), and their values (uint32)."""
    runs = np.zeros(0, np.int64) if found.runs is None else found.runs
    values = np.concatenate([runs, found.gaps]).astype(np.uint32)
    return compute_plain_symbols(runs.size, values), values


def write_low_bits(parts: Sequence[tuple[Array, Array, Array]], histogram: Array) -> bytes:
    """Return the low bits of symbols with their values and bits a token; count the symbols."""
    # One word for each number suffices, because no distance has more than 31 low bits.
    words, at = np.zeros(sum(values.size for _, values, _ in parts) + 2, "<u4"), 0
    for symbols, values, bits in parts:
        at = kernels.write_low_bits(symbols, values, bits, histogram, words, at)
    return words[: -(-at // 32)].tobytes()[: -(-at // 8)]


def decode_in_place(
    payload: bytes,
    old: Lanes,
    layout: FloatLayout,
    compiled: Any,
    reader: type[SymbolReader] | None = None,
) -> None:
    """Replace the reference in ``old`` by the decoded lanes; an error leaves ``old`` undefined.

    ``reader`` is that of codec 6 by default.
    """
    if len(payload) < _HEADER.size:
        raise ValueError("an exponent-coded chunk has no header")
    listed, gaps, runs, first_bytes, word_count, low, high, busy = _HEADER.unpack_from(payload)
    all_coded, busy = bool(busy & ALL_BLOCKS_CODED), busy & (ALL_BLOCKS_CODED - 1)
    at = _HEADER.size + first_bytes
    rest = at + 4 * word_count
    blocks = 0 if all_coded else -(-old.size // BLOCK)
    if max(listed, gaps) > old.size or runs > blocks or rest > len(payload):
        raise ValueError("an exponent-coded chunk has the wrong length")
    if low > high or high - low >= MAX_CLASSES or busy > EXPONENTS:
        raise ValueError("an exponent-coded chunk has impossible exponents")
    # The loops read two words beyond the last one.
    words = np.frombuffer(payload[at:rest] + bytes(8), "<u4")
    end, loops = 32 * word_count, kernels if compiled is None else compiled
    symbols = (reader or _RangeReader)(
        payload[_HEADER.size : at], payload[rest:], low, high, compiled
    )
    contexts = np.repeat(np.array([RUN_CONTEXT, GAP_CONTEXT], np.uint8), [runs, gaps])
    read = symbols.read_runs_and_gaps(contexts)
    values, bits = loops.read_distances(read, words, 0, end, *symbols.tokens)
    if bits > end:
        raise ValueError("an exponent-coded chunk ends too early")
    listing = Listing(low=low, high=high, busy=busy, runs=None if all_coded else values[:runs])
    positions = locate_listed(old, layout, listing, values[runs:], compiled, count=listed)
    coded = symbols.read_changes(compute_exponents(old, positions, layout, compiled))
    lanes = old.view(f"<u{old.itemsize}")
    low_bits = (words, bits, end, layout.sign, *symbols.tokens)
    bits = loops.apply_changes(lanes, positions, coded, *low_bits)
    if not 0 <= end - bits < 32:
        raise ValueError("an exponent-coded chunk has the wrong number of low bits")


class WordReader:
    """Reads sequences of symbols from words, with the tables of a chunk."""

    def __init__(
        self, levels: Array, words: bytes, count_coders: Callable[[int], int], compiled: Any
    ) -> None:
        if len(words) % 2:
            raise ValueError("a chunk ends within a word")
        self._words, self._count_coders = np.frombuffer(words, "<u2"), count_coders
        self._coder = rans if compiled is None else compiled
        self._packed = self._coder.compute_frequencies(levels)
        self._slots = self._coder.build_slots(self._packed)

    def read(self, contexts: Array) -> Array:
        """Return the symbols of one sequence; :class:`ValueError` if there are too few words."""
        coders = self._count_coders(contexts.size)
        # Decoding takes at most this many words, even from a damaged payload.
        longest = 2 * coders + contexts.size + 1
        words = self._words[:longest]
        if words.size < longest:
            words = np.zeros(longest, np.uint16)
            words[: self._words.size] = self._words
        symbols: Array
        symbols, used = self._coder.decode(
            _as_read_only(words), contexts, self._packed, self._slots, coders
        )
        if used > self._words.size:
            raise ValueError("a chunk ends too early")
        self._words = self._words[used:]
        return symbols

    def finish(self) -> None:
        """Raise :class:`ValueError` if there are words left."""
        if self._words.size:
            raise ValueError("a chunk has bytes after its end")


class _RangeReader:
    tokens = (EXTRA_BITS, SMALLEST)

    def __init__(self, first: bytes, rest: bytes, low: int, high: int, compiled: Any) -> None:
        self._low, self._high = low, high
        levels = _decode_tables(first, FIRST_CLASS + high - low + 1)
        self._reader = WordReader(levels, rest, rans.count_coders, compiled)

    def read_runs_and_gaps(self, contexts: Array) -> Array:
        return self._reader.read(contexts)

    def read_changes(self, exponents: Array) -> Array:
        classes = exponents.clip(self._low, self._high) - self._low + FIRST_CLASS
        symbols = self._reader.read(classes)
        self._reader.finish()
        return symbols


def locate_listed(
    old: Lanes, layout: FloatLayout, listing: Listing, gaps: Array, compiled: Any, *, count: int
) -> Array:
    """Return the ``count`` positions of all listed elements; :class:`ValueError` if it differs."""
    coded = _coded_blocks(listing, old.size)
    positions: Array
    if compiled is None:
        limit = listing.busy << layout.shift
        marked, quiet = torch.from_numpy(coded), torch.from_numpy(kernels.decode_gaps(gaps))
        positions = changes.locate_listed(_as_tensor(old), layout, marked, limit, quiet).numpy()
    else:
        was = _as_read_only(old.view(f"<u{old.itemsize}"))
        bounds = _busy_bounds(listing, layout, was.dtype.type)
        distances = gaps.astype(np.uint32, copy=False)
        positions = compiled.locate_listed(was, coded, *bounds, distances, count)
    if positions.size != count:
        raise ValueError("a chunk lists another number of elements than it has")
    return positions


def _coded_blocks(listing: Listing, size: int) -> Array:
    """Return a mask of the blocks of ``size`` lanes in which elements are listed."""
    blocks = -(-size // BLOCK)
    if listing.runs is None:
        return np.ones(blocks, bool)
    return changes.decode_runs(listing.runs, blocks)


def _busy_bounds(listing: Listing, layout: FloatLayout, word: Any) -> tuple[bool, Any, Any]:
    """Return whether any element is busy, the largest magnitude of one, and the mask of these."""
    limit = listing.busy << layout.shift
    return limit > 0, word(max(min(limit - 1, layout.mask), 0)), word(layout.mask)


def compute_exponents(old: Lanes, positions: Array, layout: FloatLayout, compiled: Any) -> Array:
    """Return the exponents of the lanes at some positions, uint8."""
    was = _as_read_only(old.view(f"<u{old.itemsize}"))
    exponents: Array
    if compiled is None:
        exponents = ((was[positions] & was.dtype.type(layout.mask)) >> layout.shift).astype(
            np.uint8
        )
    else:
        exponents = compiled.compute_exponents(was, positions, layout.shift, layout.mask)
    return exponents


def compute_contexts(old: Lanes, positions: Array, layout: FloatLayout, listing: Listing) -> Array:
    """Return the contexts of the lanes at some positions, uint8; zeros have one of their own."""
    was = old.view(f"<u{old.itemsize}")
    low, high = listing.low, listing.high
    magnitudes = was[positions] & was.dtype.type(layout.mask)
    classes = (magnitudes >> layout.shift).clip(low, high) - low
    contexts: Array = (classes + FIRST_CLASS).astype(np.uint8)
    contexts[magnitudes == 0] = changes.zero_context(listing)
    return contexts


def _as_tensor(lanes: Array) -> torch.Tensor:
    return torch.from_numpy(lanes if lanes.flags.writeable else lanes.copy())


def _as_read_only(lanes: Array) -> Array:
    # Numba compiles a kernel for each kind of array, so the kernels only get read-only ones.
    view: Array = lanes.view()
    view.flags.writeable = False
    return view


def compute_plain_symbols(runs: int, values: Array) -> Array:
    """Return the symbols of run lengths and gaps, with their contexts; uint16."""
    # NumPy is faster here than changes.compute_tokens, because there are only a few numbers.
    halves = (values.astype(np.float64).view(np.int64) >> 51) - 2046
    tokens = np.where(values < changes.DIRECT_TOKENS, values, halves) << 2
    tokens[runs:] |= changes.GAP_CONTEXT << 8
    symbols: Array = tokens.astype(np.uint16)
    return symbols


def _decode_tables(data: bytes, contexts: int) -> Array:
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if not 0 < size <= contexts * SYMBOLS or size % contexts:
        raise ValueError("an exponent-coded chunk has tables of the wrong length")
    steps = np.frombuffer(decompress(data, size), np.uint8).reshape(contexts, -1)
    levels = np.zeros((contexts, SYMBOLS), np.uint8)
    levels[:, : steps.shape[1]] = np.cumsum(steps, axis=0, dtype=np.uint8)
    if levels.max() > rans.LEVELS.size:
        raise ValueError("an exponent-coded chunk has impossible tables")
    return levels.reshape(-1)
