"""Codec 6: changes coded by the reference's exponent, with static range-coder tables.

The format is in ``docs/FORMAT.md``, section 5. Invariants: the payload is the same with and without
compiled kernels and on every device, and a damaged payload is a :class:`ValueError`, never an
access out of bounds.

Example::

    compiled = compiled_kernels()                     # or None without Numba
    payload = encode(find_changes(new, old, layout, compiled), compiled)
    assert (decode(payload, old, layout, compiled) == new).all()
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from msft_store.codec import changes, kernels, rans
from msft_store.codec.changes import (
    EXTRA_BITS,
    FIRST_CLASS,
    SMALLEST,
    ChunkChanges,
    FloatLayout,
    Listing,
)
from msft_store.codec.kernels import Lanes
from msft_store.codec.rans import BLOCK, EXPONENTS, MAX_CLASSES, SYMBOLS
from msft_store.format.layout import decompress, get_compressor

Array = NDArray[Any]

_HEADER = struct.Struct("<IIIIIBBH")
"""Counts of listed lanes, gaps and runs; bytes of tables; words of low bits; low, high, busy."""
ALL_BLOCKS_CODED = 1 << 15
"""The bit of ``busy`` that is set if all blocks are coded."""
_TABLE_LEVEL = 3


def find_changes(new: Lanes, old: Lanes, layout: FloatLayout, compiled: Any) -> ChunkChanges:
    """Return the changes, found by compiled kernels or, with ``None``, by PyTorch."""
    if compiled is None:
        return changes.find_changes(_as_tensor(new), _as_tensor(old), layout)
    unsigned = f"<u{new.itemsize}"
    now, was = _as_read_only(new.view(unsigned)), _as_read_only(old.view(unsigned))
    whole = new.size // BLOCK * BLOCK
    step = rans.sampling_step(-(-new.size // BLOCK))
    eights = now[:whole].view(np.uint64), was[:whole].view(np.uint64)
    blocks, counts, runs = compiled.survey_blocks(
        now, was, *eights, layout.shift, layout.mask, step
    )
    skip, busy, low, high = compiled.plan_listing(counts, runs, step)
    coded = blocks if skip else np.ones_like(blocks)
    limit = busy << layout.shift
    positions, gaps = compiled.list_elements(now, was, coded, limit, layout.mask)
    symbols, distances = compiled.compute_symbols(
        now, was, positions, layout.shift, layout.mask, low, high
    )
    return ChunkChanges(
        busy=busy,
        low=low,
        high=high,
        runs=changes.encode_runs(blocks) if skip else None,
        gaps=gaps,
        symbols=symbols,
        distances=distances,
    )


def encode(found: ChunkChanges, compiled: Any) -> bytes:
    """Return the payload of the changes."""
    runs = np.zeros(0, np.int64) if found.runs is None else found.runs
    plain = np.concatenate([runs, found.gaps]).astype(np.uint32)
    coded_plain = compute_plain_symbols(runs.size, plain)
    histogram = np.zeros((FIRST_CLASS + found.high - found.low + 1) * SYMBOLS, np.int64)
    # One word for each number suffices, because no distance has more than 31 low bits.
    words, bits = np.zeros(plain.size + found.symbols.size + 2, np.uint32), 0
    write = (kernels if compiled is None else compiled).write_low_bits
    tables = rans if compiled is None else compiled
    bits = write(coded_plain, plain, EXTRA_BITS, histogram, words, bits)
    bits = write(found.symbols, found.distances, EXTRA_BITS, histogram, words, bits)
    words = words[: -(-bits // 32)]
    levels = tables.compute_levels(histogram)
    packed = tables.compute_frequencies(levels)
    table_bytes = _encode_tables(levels)
    busy = found.busy | (ALL_BLOCKS_CODED if found.runs is None else 0)
    sizes = (found.symbols.size, found.gaps.size, runs.size, len(table_bytes), words.size)
    parts = [_HEADER.pack(*sizes, found.low, found.high, busy), table_bytes, words.tobytes()]
    return b"".join(
        parts + [_encode_symbols(part, packed, compiled) for part in (coded_plain, found.symbols)]
    )


def decode(payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any) -> Lanes:
    """Return the changed lanes; :class:`ValueError` if the payload is damaged."""
    new: Lanes = old.copy()
    decode_in_place(payload, new, layout, compiled)
    return new


def decode_in_place(payload: bytes, old: Lanes, layout: FloatLayout, compiled: Any) -> None:
    """Replace the reference in ``old`` by the decoded lanes; an error leaves ``old`` undefined."""
    if len(payload) < _HEADER.size:
        raise ValueError("an exponent-coded chunk has no header")
    listed, gaps, runs, table_bytes, word_count, low, high, busy = _HEADER.unpack_from(payload)
    all_coded, busy = bool(busy & ALL_BLOCKS_CODED), busy & (ALL_BLOCKS_CODED - 1)
    blocks = -(-old.size // BLOCK)
    at = _HEADER.size + table_bytes
    end = at + 4 * word_count
    if (
        max(listed, gaps) > old.size
        or runs > (0 if all_coded else blocks)
        or end > len(payload)
        or (len(payload) - end) % 2
    ):
        raise ValueError("an exponent-coded chunk has the wrong length")
    if low > high or high - low >= MAX_CLASSES or busy > EXPONENTS:
        raise ValueError("an exponent-coded chunk has impossible exponents")
    levels = _decode_tables(payload[_HEADER.size : at], FIRST_CLASS + high - low + 1)
    reader = _Reader(
        words=np.frombuffer(payload, "<u4", word_count, at),
        coded=np.frombuffer(payload[end:], "<u2"),
        levels=levels,
        compiled=compiled,
    )
    plain_contexts = np.repeat(np.array([0, 1], np.uint8), [runs, gaps])
    plain = reader.distances(reader.symbols(plain_contexts))
    listing = Listing(low=low, high=high, busy=busy, runs=None if all_coded else plain[:runs])
    positions, contexts = locate_listed(old, layout, listing, plain[runs:], compiled)
    if positions.size != listed:
        raise ValueError("an exponent-coded chunk lists another number of elements")
    symbols = reader.symbols(contexts)
    reader.change(old, positions, symbols, layout)
    reader.finish()


def locate_listed(
    old: Lanes, layout: FloatLayout, listing: Listing, gaps: Array, compiled: Any
) -> tuple[Array, Array]:
    """Return the positions of all listed elements, and their contexts (uint8).

    :class:`ValueError` if a position is beyond the end.
    """
    blocks = -(-old.size // BLOCK)
    coded = (
        np.ones(blocks, bool) if listing.runs is None else changes.decode_runs(listing.runs, blocks)
    )
    quiet = kernels.decode_gaps(gaps)
    limit, contexts = listing.busy << layout.shift, _contexts_by_exponent(listing.low, listing.high)
    if compiled is None:
        marked, at = torch.from_numpy(coded), torch.from_numpy(quiet)
        positions: Array = changes.locate_listed(_as_tensor(old), layout, marked, limit, at).numpy()
        exponents = (old[positions].astype(np.int64) & layout.mask) >> layout.shift
        return positions, contexts[exponents].astype(np.uint8)
    if quiet.size and quiet[-1] >= blocks * BLOCK:
        raise ValueError("a chunk changes elements beyond its end")
    was = _as_read_only(old.view(f"<u{old.itemsize}"))
    positions = compiled.locate_listed(was, coded, limit, layout.mask, quiet.astype(np.uint32))
    if positions.size < quiet.size:
        raise ValueError("a chunk changes elements beyond its end")
    first = contexts << np.uint16(8)
    return positions, compiled.compute_contexts(was, positions, layout.shift, layout.mask, first)


class _Reader:
    """Reads symbols and low bits of a payload one after the other, never beyond its end."""

    def __init__(self, *, words: Array, coded: Array, levels: Array, compiled: Any) -> None:
        self._words = np.append(words, np.zeros(2, np.uint32))
        self._bits, self._end = 0, 32 * words.size
        self._coded = coded
        self._compiled = compiled
        tables = rans if compiled is None else compiled
        self._packed = tables.compute_frequencies(levels)
        self._slots = tables.build_slots(self._packed)

    def symbols(self, contexts: Array) -> Array:
        coders = rans.count_coders(contexts.size)
        # Decoding takes at most this many words, even from a damaged payload.
        longest = 2 * coders + contexts.size + 1
        coded = self._coded[:longest]
        padded = np.concatenate([coded, np.zeros(longest - coded.size, np.uint16)])
        if self._compiled is None:
            symbols, used = rans.decode(padded, contexts, self._packed, self._slots)
        else:
            symbols, used = self._compiled.decode(
                padded, contexts, self._packed, self._slots, coders
            )
        if used > self._coded.size:
            raise ValueError("an exponent-coded chunk ends too early")
        self._coded = self._coded[used:]
        found: Array = symbols
        return found

    def distances(self, symbols: Array) -> Array:
        read = (kernels if self._compiled is None else self._compiled).read_distances
        low_bits = (self._words, self._bits, self._end, EXTRA_BITS, SMALLEST)
        distances, at = read(symbols, *low_bits)
        self._advance(at)
        found: Array = distances
        return found

    def change(self, new: Lanes, positions: Array, symbols: Array, layout: FloatLayout) -> None:
        lanes = new.view(f"<u{new.itemsize}")
        apply = (kernels if self._compiled is None else self._compiled).apply_changes
        low_bits = (self._words, self._bits, self._end, layout.sign, EXTRA_BITS, SMALLEST)
        self._advance(apply(lanes, positions, symbols, *low_bits))

    def finish(self) -> None:
        if self._coded.size or self._end - self._bits >= 32:
            raise ValueError("an exponent-coded chunk has bytes after its end")

    def _advance(self, at: int) -> None:
        if at > self._end:
            raise ValueError("an exponent-coded chunk ends too early")
        self._bits = at


def _encode_symbols(symbols: Array, packed: Array, compiled: Any) -> bytes:
    if compiled is None:
        return rans.encode(symbols, packed).tobytes()
    coded: bytes = compiled.encode(symbols, packed, rans.count_coders(symbols.size)).tobytes()
    return coded


def _as_tensor(lanes: Array) -> torch.Tensor:
    return torch.from_numpy(lanes if lanes.flags.writeable else lanes.copy())


def _as_read_only(lanes: Array) -> Array:
    # Numba compiles a kernel for each kind of array, so the kernels only get read-only ones.
    view: Array = lanes.view()
    view.flags.writeable = False
    return view


@functools.lru_cache
def _contexts_by_exponent(low: int, high: int) -> Array:
    """Return the context of each exponent, uint16."""
    exponents = np.arange(EXPONENTS).clip(low, high) - low + FIRST_CLASS
    contexts: Array = exponents.astype(np.uint16)
    return contexts


def compute_plain_symbols(runs: int, values: Array) -> Array:
    """Return the symbols of run lengths and gaps, with their contexts; uint16."""
    # NumPy is faster here than changes.compute_tokens, because there are only a few numbers.
    halves = (values.astype(np.float64).view(np.int64) >> 51) - 2046
    tokens = np.where(values < changes.DIRECT_TOKENS, values, halves) << 2
    tokens[runs:] |= changes.GAP_CONTEXT << 8
    symbols: Array = tokens.astype(np.uint16)
    return symbols


def _encode_tables(levels: Array) -> bytes:
    table = levels.reshape(-1, SYMBOLS)
    columns = np.flatnonzero(table.any(axis=0))
    used = int(columns[-1]) + 1 if columns.size else 1
    rows = table[:, :used]
    steps = np.diff(rows, axis=0, prepend=np.zeros((1, used), np.uint8))
    return get_compressor(_TABLE_LEVEL).compress(steps.tobytes())


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
