"""Extract the intact parts of damaged manifests, configs, refs and packs.

Invariant: a digest proves that the returned bytes are those that were written. Appended bytes are
cut off. A pack with a damaged header or trailer is read by its footer.

Example::

    extract_sealed(data)                                  # the line as it was written, or None
    extract_footer(backend, "packs/00ff.pack")            # its records, or None
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator

import xxhash
import zstandard

from msft_store.errors import CorruptedError
from msft_store.format.layout import KEY_BYTES, decompress, digest
from msft_store.format.pack_footer import (
    PACK_MAGIC,
    PACK_TRAILER,
    RECORD_BYTES,
    Footer,
    Trailer,
    decode_footer,
    decode_trailer,
    max_footer_bytes,
)
from msft_store.format.strict_json import check_object, parse
from msft_store.objects.manifest import table_frames
from msft_store.objects.packs import pack_path
from msft_store.storage.backend import Backend

_MAX_SEARCHED = 1 << 26
"""Number of bytes that are searched for the footer of a pack or the end of a line."""
_MAX_CANDIDATES = 64
"""Number of candidates for a trailer or a footer that are tried."""
_SEAL = re.compile(rb',"digest":"([0-9a-f]{32})"')
_TABLE = re.compile(rb'"tensors":"([0-9a-f]{32})"')
_FRAME = b"\x28\xb5\x2f\xfd"
"""The first bytes of a zstd frame."""


def extract_sealed(data: bytes) -> bytes | None:
    """Return the sealed JSON line at the start of the data, or ``None`` if it is damaged."""
    if _is_sealed(data):
        return data
    try:
        text = data[:_MAX_SEARCHED].decode("ascii", "replace")
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return data[:end] if _is_sealed(data[:end]) else None


def extract_manifest(data: bytes) -> bytes | None:
    """Return a manifest without appended bytes, or ``None`` if a line of text is damaged.

    Only a reader can check the frames of version 2, because that takes the base.
    """
    line, _, rest = data.partition(b"\n")
    head = extract_sealed(line)
    if head is None:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        frames = table_frames(check_object(parse(head)))
        return head + b"\n" + rest[: sum(length for length, _ in frames)]
    stated, table = _TABLE.search(head), rest.partition(b"\n")[0]
    if stated is None or digest(table) != stated[1].decode():
        return None
    return head + b"\n" + table + b"\n"


def extract_footer(backend: Backend, path: str) -> Footer | None:
    """Return the footer of a pack whose header or trailer is damaged, or ``None``."""
    size = backend.size(path)
    begin = max(size - _MAX_SEARCHED, 0)
    tail = backend.read(path, begin, size - begin)
    for trailer in _trailers(tail, begin, path):
        at = trailer.offset - begin
        if at >= 0:
            with contextlib.suppress(CorruptedError):
                return decode_footer(
                    tail[at : at + trailer.length], trailer, backend.describe(path)
                )
    return None


def _trailers(tail: bytes, begin: int, path: str) -> Iterator[Trailer]:
    """Yield candidates for the trailer of a pack that ends with ``tail`` at offset ``begin``."""
    end = len(tail)
    # Bytes after the last magic number were appended.
    for _ in range(_MAX_CANDIDATES):
        magic = tail.rfind(PACK_MAGIC, 0, end)
        if magic < 0:
            break
        end, stop = magic, magic + len(PACK_MAGIC)
        with contextlib.suppress(CorruptedError):
            piece = tail[max(stop - PACK_TRAILER.size, 0) : stop]
            yield decode_trailer(piece, begin + stop, path)
    # If the trailer is damaged, the name of the pack, a digest, identifies the footer before it.
    end = stop = len(tail) - PACK_TRAILER.size
    for _ in range(_MAX_CANDIDATES):
        at = tail.rfind(_FRAME, 0, max(end, 0))
        if at < 0:
            return
        end, found = at + len(_FRAME) - 1, tail[at:stop]
        check = xxhash.xxh3_128_digest(found)
        if path == pack_path(check):
            yield from _trailers_of(found, begin + at, check)


def _trailers_of(footer: bytes, offset: int, check: bytes) -> Iterator[Trailer]:
    """Yield the trailer that belongs to a footer."""
    with contextlib.suppress(ValueError, struct.error, zstandard.ZstdError):
        size = zstandard.get_frame_parameters(footer).content_size
        if size <= max_footer_bytes(len(footer) // KEY_BYTES):
            raw = decompress(footer, size)
            (length,) = struct.unpack_from("<I", raw)
            count = (size - 4 - length) // RECORD_BYTES
            yield Trailer(offset=offset, length=len(footer), size=size, count=count, check=check)


def _is_sealed(data: bytes) -> bool:
    """Return True if a line contains the digest of its other bytes."""
    return any(
        digest(data[: seal.start()] + data[seal.end() :]) == seal[1].decode()
        for seal in _SEAL.finditer(data)
    )
