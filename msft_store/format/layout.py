"""Digests, canonical JSON, keys and compression: ``docs/FORMAT.md`` in code, without any I/O.

Invariants: everything is little-endian, JSON that is hashed is canonical, sizes are checked before
memory is taken, and unexpected content is a :class:`CorruptedError`.

Example::

    name = digest(canonical_json({"step": 10}))               # 32 hex digits
    key = chunk_key(data, dtype_by_name("bfloat16"))          # 16 bytes
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
from msft_store.format.mapping import View
from msft_store.format.strict_json import parse

VERSION = 1
"""Version of the files whose layout is the same in every version: bases, refs and lists."""
VERSIONS = (1, 2)
"""Versions of stores, manifests and packs. A store holds files of its own version or earlier."""
NEWEST = VERSIONS[-1]
"""Version of a new store."""
CHUNK_BYTES = 4 << 20
"""Bytes of the largest chunk; a multiple of every element size."""
KEY_BYTES = 16
MAX_DEPTH = {1: 2, 2: 16}
"""Largest number of references between a chunk and plain bytes, by version of the pack."""
MAX_GENERATION = 255
_FEW_MATCHES = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)
_MAX_WINDOW = 1 << 27
"""Bytes of the largest window of a zstd frame."""

_local = threading.local()


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSpan:
    """A reference in a base: elements of one tensor, or of a box of it."""

    tensor: str
    start: int
    """First element, counted in the box (row-major)."""
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Offset and shape; ``None`` for the whole tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpan:
    """A reference in a base: elements of a view of its tensors, or of a box of the view."""

    view: View
    start: int
    """First element, counted in the box (row-major)."""
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Offset and shape; ``None`` for the whole view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSpan:
    """A reference in another chunk: ``length`` of its decoded bytes from ``start``."""

    key: bytes
    start: int
    length: int


References = BaseSpan | ViewSpan | tuple[ChunkSpan, ...]
"""The content that a record refers to: a range of a base, or the ranges of chunks in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One representation of one chunk in a pack."""

    key: bytes
    offset: int
    """Offset of the payload in the pack file, bytes."""
    length: int
    """Bytes of the payload."""
    size: int
    """Bytes of the decoded chunk."""
    codec: int
    dtype: int
    depth: int
    """0 without a reference, 1 against the base, else one more than the chunks referred to."""
    base: str | None
    """Id of the base that decoding needs, directly or through other chunks.

    At depth 0: the base that has this chunk too, and that this copy serves in place of.
    """
    ref_key: bytes = bytes(KEY_BYTES)
    """Digest of the reference's bytes as the codec uses them; zeros without a reference."""
    generation: int = 0
    """Number of times that the chunk was re-encoded; a later record replaces an earlier one."""
    reference: References | None = None

    @property
    def refers_to_chunk(self) -> bool:
        """True if decoding needs another chunk, not only the base."""
        if self.reference is None:
            return self.ref_key != bytes(KEY_BYTES)
        return isinstance(self.reference, tuple)

    @property
    def chunk_keys(self) -> tuple[bytes, ...]:
        """Keys of the chunks that decoding needs directly."""
        if not self.refers_to_chunk:
            return ()
        spans = self.reference if isinstance(self.reference, tuple) else None
        return (self.ref_key,) if spans is None else tuple(span.key for span in spans)


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of a value: sorted keys, no spaces, ASCII, no NaN.

    :class:`InvalidInputError` if the value is not JSON.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"a value cannot be written as JSON: {error}") from None


def digest(data: bytes) -> str:
    """Return the xxh3-128 of bytes as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def chunk_key(data: Any, dtype: DType) -> bytes:
    """Return the key of a chunk: xxh3-128 over the dtype's name, a zero byte, and the content."""
    state = xxhash.xxh3_128(dtype.name.encode() + b"\0")
    state.update(data)
    return state.digest()


def join_keys(keys: Sequence[bytes]) -> str:
    """Return the hex string that a manifest holds for the keys of a piece's chunks."""
    return b"".join(keys).hex()


def split_keys(text: str, nbytes: int) -> tuple[bytes, ...]:
    """Undo :func:`join_keys`; :class:`ValueError` if ``nbytes`` need another number of keys."""
    keys = bytes.fromhex(text)
    if len(keys) != KEY_BYTES * -(-nbytes // CHUNK_BYTES):
        raise ValueError(f"{nbytes} bytes need another number of chunk keys")
    return tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))


def seal(content: Mapping[str, Any]) -> bytes:
    """Return one line of JSON that carries its own digest."""
    return canonical_json({**content, "digest": digest(canonical_json(content))})


def unseal(
    data: bytes, file: str, kind: str, versions: Sequence[int] = (VERSION,)
) -> dict[str, Any]:
    """Parse sealed JSON and check its digest, ``format`` (``kind``) and version.

    ``file`` names the file in messages.
    """
    try:
        content = parse(data)
    except ValueError:
        raise CorruptedError(f"{file} is not valid JSON; {REPAIR_HINT}", file=file) from None
    if not isinstance(content, dict):
        raise CorruptedError(f"{file} is not a {kind} file; {REPAIR_HINT}", file=file)
    stated = content.pop("digest", None)
    try:
        sound = stated == digest(canonical_json(content))
    except InvalidInputError:
        sound = False
    if not sound:
        raise CorruptedError(f"{file} does not match its digest; {REPAIR_HINT}", file=file)
    if content.get("format") != kind:
        raise CorruptedError(f"{file} is not a {kind} file; {REPAIR_HINT}", file=file)
    if content.get("version") not in versions or type(content["version"]) is not int:
        raise VersionError(
            f"{file} has format version {content.get('version')!r:.40}; this msft-store reads "
            f"version {versions[-1]} and earlier: use the release that wrote it or a newer one"
        )
    return content


def get_compressor(level: int | None) -> zstandard.ZstdCompressor:
    """Return this thread's compressor of a level; ``None`` for entropy coding with few matches.

    Compressors are cached because creating one takes longer than compressing a small chunk.
    """
    cache: dict[int | None, zstandard.ZstdCompressor] = _local.__dict__.setdefault("cache", {})
    if level not in cache:
        cache[level] = (
            zstandard.ZstdCompressor(compression_params=_FEW_MATCHES)
            if level is None
            else zstandard.ZstdCompressor(level=level)
        )
    return cache[level]


def compress_against(data: bytes, dictionary: bytes) -> bytes:
    """Return a zstd frame of data that may copy from all of a dictionary; it may be empty."""
    # The tables reach back to the beginning of the dictionary, also from the end of the data.
    reach = min((len(data) + len(dictionary)).bit_length(), _MAX_WINDOW.bit_length() - 1)
    log = max(reach, 17)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        9, window_log=log, hash_log=log, chain_log=log
    )
    known = _as_dictionary(dictionary)
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=known).compress(data)


def _as_dictionary(data: bytes) -> zstandard.ZstdCompressionDict | None:
    if not data:
        return None
    return zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def decompress(payload: bytes, size: int, dictionary: bytes = b"") -> memoryview:
    """Decompress a zstd frame; :class:`ValueError` unless it holds exactly ``size`` bytes.

    Memory is bounded by ``size``, whatever size the frame declares.
    """
    try:
        declared = zstandard.get_frame_parameters(payload)
        if declared.content_size == size and declared.window_size <= _MAX_WINDOW:
            known = _as_dictionary(dictionary)
            decompressor = (
                zstandard.ZstdDecompressor(dict_data=known) if known else _get_decompressor()
            )
            return memoryview(decompressor.decompress(payload, allow_extra_data=False))
        if dictionary:
            raise ValueError("compressed data has another length than declared")
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
    # Creating one takes longer than decompressing a small frame, and two threads cannot share one.
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    return decompressor
