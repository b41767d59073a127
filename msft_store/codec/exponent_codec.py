"""Codec 6: changes coded by the reference's exponent, with static range-coder tables.

The format is in ``docs/FORMAT.md``, section 5. Invariants: the payload is the same with and without
compiled kernels and on every device, and a damaged payload is a :class:`ValueError`, never an
access out of bounds. :mod:`msft_store.codec.adaptive_codec` finds, lists and applies changes with
the functions of this module too.

Example::

    compiled = compiled_kernels()                     # or None without Numba
    payload = encode(find_changes(new, old, layout, compiled), compiled)
    decode_in_place(payload, old, layout, compiled)   # old is now equal to new
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
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
from msft_store.format.layout import decompress, get_compressor

Array = NDArray[Any]

_HEADER = struct.Struct("<IIIIIBBH")
"""Counts of listed lanes, gaps and runs; bytes of the first part; words of low bits; low, high,
busy."""
ALL_BLOCKS_CODED = 1 << 15
"""The bit of ``busy`` that is set if all blocks are coded."""
_TABLE_LEVEL = 3
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
    whole = new.size // BLOCK * BLOCK
    step = rans.sampling_step(-(-new.size // BLOCK))
    words = now[:whole].view(np.uint64), was[:whole].view(np.uint64)
    busy, low, high, skip, (runs, gaps, symbols, distances), listed = compiled.find_changes(
        now, was, *words, layout.shift, layout.mask, step
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


def write_low_bits(
    parts: Sequence[tuple[Array, Array]], bits: Array, histogram: Array, compiled: Any
) -> Array:
    """Return the low bits of symbols and their values as words; count the symbols."""
    # One word for each number suffices, because no distance has more than 31 low bits.
    words, at = np.zeros(sum(values.size for _, values in parts) + 2, np.uint32), 0
    for symbols, values in parts:
        write = (kernels if compiled is None else compiled).write_low_bits
        at = write(symbols, values, bits, histogram, words, at)
    return words[: -(-at // 32)]


def join_payload(found: ChunkChanges, first: bytes, words: Array, rest: bytes) -> bytes:
    """Return a payload: its header, a first part, the words of low bits, and the rest."""
    runs = 0 if found.runs is None else found.runs.size
    busy = found.busy | (ALL_BLOCKS_CODED if found.runs is None else 0)
    sizes = (found.symbols.size, found.gaps.size, runs, len(first), words.size)
    header = _HEADER.pack(*sizes, found.low, found.high, busy)
    return b"".join([header, first, words.tobytes(), rest])


def encode(found: ChunkChanges, compiled: Any) -> bytes:
    """Return the payload of the changes."""
    histogram = np.zeros((FIRST_CLASS + found.high - found.low + 1) * SYMBOLS, np.int64)
    parts = [list_runs_and_gaps(found), (found.symbols, found.distances)]
    words = write_low_bits(parts, EXTRA_BITS, histogram, compiled)
    coder = rans if compiled is None else compiled
    levels = rans.compute_levels(histogram)
    packed = coder.compute_frequencies(levels)
    coded = [coder.encode(part, packed, rans.count_coders(part.size)) for part, _ in parts]
    rest = b"".join(part.tobytes() for part in coded)
    return join_payload(found, _encode_tables(levels), words, rest)


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
    streams = _open_streams(payload, old.size, compiled, reader or _RangeReader)
    listing, count = streams.listing, streams.listed
    positions = locate_listed(old, layout, listing, streams.gaps, compiled, count=count)
    coded = streams.symbols.read_changes(compute_exponents(old, positions, layout, compiled))
    lanes, loops = old.view(f"<u{old.itemsize}"), kernels if compiled is None else compiled
    low_bits = (streams.words, streams.start, streams.end, layout.sign, *streams.symbols.tokens)
    bits = loops.apply_changes(lanes, positions, coded, *low_bits)
    if not 0 <= streams.end - bits < 32:
        raise ValueError("an exponent-coded chunk has the wrong number of low bits")


def restores(
    payload: bytes,
    size: int,
    found: ChunkChanges,
    layout: FloatLayout,
    compiled: Any,
    *,
    reader: type[SymbolReader] | None = None,
) -> bool:
    """Return True if a payload decodes to the ``size`` lanes in which changes were found.

    The search has compared all lanes, so a payload is proven by the elements that it lists and by
    their values. ``found`` must hold those.
    """
    listed = found.listed
    try:
        streams = _open_streams(payload, size, compiled, reader or _RangeReader)
        if listed is None or streams.listed != listed.positions.size:
            return False
        exponents = (listed.references & layout.mask) >> layout.shift
        coded = streams.symbols.read_changes(exponents.astype(np.uint8))
        blocks = _coded_blocks(streams.listing, size)
    except ValueError:
        return False
    low_bits = (streams.words, streams.start, streams.end, layout.sign, *streams.symbols.tokens)
    bounds = _busy_bounds(streams.listing, layout, listed.references.dtype.type)
    elements = listed.values, listed.references, listed.positions
    proven: bool = compiled.restores(*elements, blocks, *bounds, streams.gaps, coded, *low_bits)
    return proven


@dataclass(frozen=True, kw_only=True)
class _Streams:
    """The opened streams of a payload."""

    listing: Listing
    listed: int
    """Number of listed elements."""
    gaps: Array
    symbols: SymbolReader
    words: Array
    """Words of low bits, and two more."""
    start: int
    """First low bit of the changes."""
    end: int


def _open_streams(payload: bytes, size: int, compiled: Any, reader: type[SymbolReader]) -> _Streams:
    """Read a payload for ``size`` lanes up to the symbols of changes; or :class:`ValueError`."""
    if len(payload) < _HEADER.size:
        raise ValueError("an exponent-coded chunk has no header")
    listed, gaps, runs, first_bytes, word_count, low, high, busy = _HEADER.unpack_from(payload)
    all_coded, busy = bool(busy & ALL_BLOCKS_CODED), busy & (ALL_BLOCKS_CODED - 1)
    at = _HEADER.size + first_bytes
    rest = at + 4 * word_count
    blocks = 0 if all_coded else -(-size // BLOCK)
    if max(listed, gaps) > size or runs > blocks or rest > len(payload):
        raise ValueError("an exponent-coded chunk has the wrong length")
    if low > high or high - low >= MAX_CLASSES or busy > EXPONENTS:
        raise ValueError("an exponent-coded chunk has impossible exponents")
    # The loops read two words beyond the last one.
    words = np.frombuffer(payload[at:rest] + bytes(8), "<u4")
    end, loops = 32 * word_count, kernels if compiled is None else compiled
    symbols = reader(payload[_HEADER.size : at], payload[rest:], low, high, compiled)
    contexts = np.repeat(np.array([RUN_CONTEXT, GAP_CONTEXT], np.uint8), [runs, gaps])
    read = symbols.read_runs_and_gaps(contexts)
    values, start = loops.read_distances(read, words, 0, end, *symbols.tokens)
    if start > end:
        raise ValueError("an exponent-coded chunk ends too early")
    return _Streams(
        listing=Listing(low=low, high=high, busy=busy, runs=None if all_coded else values[:runs]),
        listed=listed,
        gaps=values[runs:],
        symbols=symbols,
        words=words,
        start=start,
        end=end,
    )


class _RangeReader:
    tokens = (EXTRA_BITS, SMALLEST)

    def __init__(self, first: bytes, rest: bytes, low: int, high: int, compiled: Any) -> None:
        self._low, self._high = low, high
        self._coder = rans if compiled is None else compiled
        levels = _decode_tables(first, FIRST_CLASS + high - low + 1)
        self._packed = self._coder.compute_frequencies(levels)
        self._slots = self._coder.build_slots(self._packed)
        self._words = np.frombuffer(rest, "<u2")

    def read_runs_and_gaps(self, contexts: Array) -> Array:
        coders = rans.count_coders(contexts.size)
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
            raise ValueError("an exponent-coded chunk ends too early")
        self._words = self._words[used:]
        return symbols

    def read_changes(self, exponents: Array) -> Array:
        classes = exponents.clip(self._low, self._high) - self._low + FIRST_CLASS
        symbols = self.read_runs_and_gaps(classes)
        if self._words.size:
            raise ValueError("an exponent-coded chunk has bytes after its end")
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
