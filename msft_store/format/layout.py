"""Digests, canonical JSON and records: ``docs/FORMAT.md`` in code, without any I/O.

Invariants: everything is little-endian; JSON that is hashed is canonical; whatever is parsed is
checked for its sizes before memory is taken, and anything unexpected is a :class:`CorruptedError`.

Example::

    name = digest(canonical({"step": 10}))          # 32 hex digits
    key = chunk_key(data, by_name("bfloat16"))      # 16 bytes
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash
import zstandard

from msft_store.errors import REPAIR_HINT, CorruptedError, InvalidInputError, VersionError
from msft_store.format.dtypes import DType
from msft_store.format.strict_json import parse

VERSION = 1
CHUNK_BYTES = 4 << 20
"""The largest chunk; a multiple of every element size."""
KEY_BYTES = 16
MAX_DEPTH = 2
"""How many references lie between a chunk and plain bytes at most."""
MAX_GENERATION = 255
_SKEW = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)
_MAX_WINDOW = 1 << 27
"""Of a zstd frame, bytes."""

_local = threading.local()


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSpan:
    """A reference in a base: elements of one tensor, or of a box of it."""

    tensor: str
    start: int
    """First element, counted in the box (row-major)."""
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Offset and shape; ``None``: the whole tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSpan:
    """A reference in another chunk: ``length`` of its decoded bytes from ``start``."""

    key: bytes
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One representation of one chunk in a pack."""

    key: bytes
    offset: int
    """Of the payload in the pack file, bytes."""
    length: int
    """Payload bytes."""
    size: int
    """Decoded bytes."""
    codec: int
    dtype: int
    depth: int
    """0: no reference; 1: the base or a chunk of depth 0; 2: a chunk of depth 1."""
    base: str | None
    """Id of the base that decoding needs, directly or through other chunks."""
    ref_key: bytes = bytes(KEY_BYTES)
    """Digest of the reference's bytes as the codec uses them; zeros without a reference."""
    generation: int = 0
    """How often the chunk has been encoded anew; a later record replaces an earlier one."""
    reference: BaseSpan | tuple[ChunkSpan, ...] | None = None

    @property
    def refers_to_chunk(self) -> bool:
        """Whether decoding needs another chunk, not only the base."""
        if self.reference is None:
            return self.ref_key != bytes(KEY_BYTES)
        return not isinstance(self.reference, BaseSpan)


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of a value: sorted keys, no spaces, ASCII, no NaN.

    :class:`InvalidInputError` if the value is not JSON.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"not representable as JSON: {error}") from None


def digest(data: bytes) -> str:
    """Return the xxh3-128 of bytes as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def chunk_key(data: Any, dtype: DType) -> bytes:
    """Return the key of a chunk: xxh3-128 over the dtype's name, a zero byte, and the content."""
    state = xxhash.xxh3_128(dtype.name.encode() + b"\0")
    state.update(data)
    return state.digest()


def join_keys(keys: Sequence[bytes]) -> str:
    """Return the keys of a piece's chunks as JSON holds them."""
    return b"".join(keys).hex()


def split_keys(text: str, nbytes: int) -> tuple[bytes, ...]:
    """Undo :func:`join_keys` for a piece of ``nbytes``; :class:`ValueError` for another number."""
    keys = bytes.fromhex(text)
    if len(keys) != KEY_BYTES * -(-nbytes // CHUNK_BYTES):
        raise ValueError(f"{nbytes} bytes have another number of chunks")
    return tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))


def seal(content: Mapping[str, Any]) -> bytes:
    """Return one line of JSON that carries its own digest."""
    return canonical_json({**content, "digest": digest(canonical_json(content))})


def unseal(data: bytes, what: str, kind: str) -> dict[str, Any]:
    """Parse what :func:`seal` wrote.

    ``kind`` is the ``format`` that is expected, ``what`` names the file in messages.
    """
    try:
        content = parse(data)
    except ValueError:
        raise CorruptedError(f"{what} is not valid JSON; {REPAIR_HINT}", file=what) from None
    if not isinstance(content, dict):
        raise CorruptedError(f"{what} is not a {kind} file; {REPAIR_HINT}", file=what)
    stated = content.pop("digest", None)
    try:
        sound = stated == digest(canonical_json(content))
    except InvalidInputError:
        sound = False
    if not sound:
        raise CorruptedError(f"{what} does not match its digest; {REPAIR_HINT}", file=what)
    if content.get("format") != kind:
        raise CorruptedError(f"{what} is not a {kind} file; {REPAIR_HINT}", file=what)
    if content.get("version") != VERSION or type(content["version"]) is not int:
        raise VersionError(
            f"{what} has format version {content.get('version')!r:.40}; "
            f"this msft-store reads version {VERSION}: use the release that wrote it or a newer one"
        )
    return content


def get_compressor(level: int | None) -> zstandard.ZstdCompressor:
    """Return this thread's compressor of a level; ``None``: one that looks for little but skew.

    To make one takes longer than to use it on little data.
    """
    mine: dict[int | None, zstandard.ZstdCompressor] = _local.__dict__.setdefault("mine", {})
    if level not in mine:
        mine[level] = (
            zstandard.ZstdCompressor(compression_params=_SKEW)
            if level is None
            else zstandard.ZstdCompressor(level=level)
        )
    return mine[level]


def decompress(payload: bytes, size: int) -> memoryview:
    """Decompress a zstd frame that must hold exactly ``size`` bytes; :class:`ValueError` otherwise.

    Memory is bounded by ``size``, whatever the frame declares.
    """
    try:
        declared = zstandard.get_frame_parameters(payload)
        if declared.content_size == size and declared.window_size <= _MAX_WINDOW:
            whole = _get_decompressor().decompress(payload, allow_extra_data=False)
            return memoryview(whole)
        return _decompress_unsized(payload, size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _decompress_unsized(payload: bytes, size: int) -> memoryview:
    view = memoryview(bytearray(size))
    with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(payload) as reader:
        filled = 0
        while filled < size:
            got = reader.readinto(view[filled:])
            if got == 0:
                raise ValueError("compressed data ends early")
            filled += got
        if reader.read(1):
            raise ValueError("compressed data is longer than declared")
    return view


def _get_decompressor() -> zstandard.ZstdDecompressor:
    # Making one takes longer than decompressing a small frame; none may serve two threads at once.
    found: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found
