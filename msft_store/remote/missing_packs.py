"""Which packs another store lacks, and what of them goes.

Invariant: a store that had only records whose references are there has only such records
afterwards. A pack may hold records that no checkpoint needs and whose references a gc removed, or
whose references do not go along; in another store, such a record could be preferred to a sound one
of the same chunk. So a pack with such records goes without them, as another pack, whose name
follows from what is left: the same selection is the same pack again.

Example::

    for shipment in choose(source, target, catalog.keys_by_base(checkpoints)):
        remote.put(shipment.path, partial(shipment.parts, backend), shipment.size)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from msft_store.errors import REPAIR_HINT, BaseError, CorruptedError, StorageError, StoreError
from msft_store.format.key_table import Keys, concatenate_keys, view_keys
from msft_store.format.layout import MAX_DEPTH, Record
from msft_store.format.pack_footer import (
    PACK_HEADER,
    PACK_TRAILER,
    Footer,
    decode_footer,
    decode_trailer,
    encode_footer,
    pack_header,
)
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.packs import PackIndex, StoredChunk, is_misnamed, pack_path
from msft_store.objects.reachability import find_reachable
from msft_store.pipeline.parallel import in_order
from msft_store.remote.transfer import Tally
from msft_store.remote.transport.base import PART_BYTES, spans
from msft_store.storage.backend import Backend

Rows = NDArray[np.bool_]
Piece = bytes | tuple[int, int]
"""Part of a pack as it goes: bytes, or offset and length of them where it comes from."""


class UnsoundTargetError(StoreError):
    """What goes would be displaced by records in the target whose references are gone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shipment:
    """A pack that goes to another store."""

    path: str
    source: str
    """Path of the pack that it is, or is a selection of, where it comes from."""
    size: int
    footer: Footer
    """Of the pack as it goes."""
    records: tuple[Record, ...] | None
    """The source's records that it is a selection of; ``None``: it goes as it is."""
    end: bytes
    """Footer and trailer in bytes, of a selection."""
    needed: tuple[int, ...] = ()
    """Numbers of the records that checkpoints need."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the pack in order: bytes, or offset and length of them where it comes from."""
        if self.records is None:
            yield from spans(self.size)
            return
        yield pack_header()
        yield from _runs(self.records)
        yield self.end

    def get(self, backend: Backend, piece: Piece) -> bytes:
        """Return the bytes of a piece, from the backend that the pack comes from."""
        return piece if isinstance(piece, bytes) else _exactly(backend, self.source, *piece)

    def parts(self, backend: Backend) -> Iterator[bytes]:
        """Yield the bytes of the pack, from the backend that it comes from."""
        for piece in self.pieces():
            yield self.get(backend, piece)

    def at_source(self) -> Iterator[StoredChunk]:
        """Yield the needed records as they stand where the pack comes from."""
        for number in self.needed:
            record = self.footer.record(number) if self.records is None else self.records[number]
            yield StoredChunk(pack=self.source, record=record)

    def at_target(self) -> Iterator[StoredChunk]:
        """Yield the needed records as they stand where the pack goes to."""
        for number in self.needed:
            yield StoredChunk(pack=self.path, record=self.footer.record(number))


def _runs(records: Iterable[Record]) -> Iterator[tuple[int, int]]:
    """Yield offset and length of what records take up; neighbours together, as far as is read."""
    start = end = 0
    for record in records:
        if record.offset != end or record.offset + record.length - start > PART_BYTES:
            if end > start:
                yield start, end - start
            start = record.offset
        end = record.offset + record.length
    if end > start:
        yield start, end - start


def _exactly(backend: Backend, path: str, offset: int, length: int) -> bytes:
    data = backend.read(path, offset, length)
    if len(data) != length:
        what = backend.describe(path)
        raise StorageError(f"{what} is shorter than it was", file=what)
    return data


def choose(
    source: ChunkStore, backend: Backend, target: ChunkStore, keys: Mapping[str | None, Keys]
) -> list[Shipment]:
    """Return the packs that a target lacks of what restoring chunks needs.

    ``keys`` are those of checkpoints, by their base; ``backend`` is what the source reads from.
    :class:`CorruptedError` if the source lacks some of it, :class:`UnsoundTargetError` if the
    target holds records whose references are gone, and that would be preferred.
    """
    missing = find_reachable(source, source.index, keys).missing
    if len(missing):
        hint = "".join(f"; {error}" for error in source.damaged.values())
        raise CorruptedError(
            f"{len(missing)} chunks that checkpoints of {backend.describe('')} need are in no "
            f"pack{hint}; {REPAIR_HINT}"
        )
    theirs = target.packs
    offered = {path: footer for path, footer in source.packs.items() if path not in theirs}
    sound = whole_rows(source, source.index)
    rows = dict(source.index.slices())
    found = {
        shipment.path: shipment
        for path, footer in offered.items()
        for shipment in _selected(_as_is(backend, path, footer), sound[rows[path]])
        if shipment.path not in theirs
    }
    found = _live(source, found, theirs, keys)
    known = PackIndex({**theirs, **{path: one.footer for path, one in found.items()}})
    sound, rows = whole_rows(source, known), dict(known.slices())
    found = {
        shipment.path: shipment
        for path, one in found.items()
        for shipment in _selected(one, sound[rows[path]])
        if shipment.path not in theirs
    }
    return list(_live(source, found, theirs, keys).values())


def objects_of(backend: Backend) -> ChunkStore:
    """Return the chunks of a store as it is now."""
    objects = ChunkStore(backend)
    objects.refresh()
    return objects


def lacks(source: ChunkStore, target: ChunkStore, keys: Mapping[str | None, Keys]) -> bool:
    """Return whether a target lacks anything of what restoring chunks needs."""
    return bool(len(find_reachable(source, target.index, keys).missing))


def whole_rows(objects: ChunkStore, index: PackIndex) -> Rows:
    """Return which rows of an index have all that they refer to, down to plain bytes."""
    whole = ~index.refers_to_chunk
    bases = objects.bases()
    for depth in range(1, MAX_DEPTH + 1):
        here = np.flatnonzero(index.refers_to_chunk & (index.depths == depth))
        for number in np.unique(index.bases[here]).tolist():
            base = index.base_of(number)
            if base is not None and base not in bases:
                continue
            rows = here[index.bases[here] == number]

            def there(keys: Keys, base: str | None = base, depth: int = depth) -> Rows:
                found = index.find_all(keys, base)
                sound: Rows = (found >= 0) & (index.depths[found] < depth) & whole[found]
                return sound | objects.mask_in_base(keys, base)

            plain = rows[~index.explicit[rows]]
            whole[plain] = there(index.ref_keys[plain])
            for row in rows[index.explicit[rows]].tolist():
                whole[row] = bool(there(view_keys(b"".join(index.explicit_keys(row)))).all())
    return whole


def verify(objects: ChunkStore, shipments: Sequence[Shipment], tally: Tally, *, come: bool) -> int:
    """Decode what checkpoints need of shipments, and compare each chunk with its key.

    ``come``: as they stand where they went to; else where they come from.

    Returns how many could not be decoded because a base is not at hand; :class:`CorruptedError`
    names the file that is to blame.
    """

    def stored() -> Iterator[StoredChunk]:
        for shipment in shipments:
            yield from shipment.at_target() if come else shipment.at_source()

    tally.begin("verify", sum(one.record.length for one in stored()))

    def look(one: StoredChunk) -> bool:
        tally.passed(one.record.length)
        try:
            objects.verify(one)
        except BaseError:
            return False
        return True

    with contextlib.closing(in_order(look, stored())) as results:
        return sum(not seen for seen in results)


def _live(
    source: ChunkStore,
    found: Mapping[str, Shipment],
    theirs: Mapping[str, Footer],
    keys: Mapping[str | None, Keys],
) -> dict[str, Shipment]:
    """Return the shipments of which something is needed, with what that is."""
    union = PackIndex({**theirs, **{path: one.footer for path, one in found.items()}})
    needs = find_reachable(source, union, keys)
    if len(needs.missing):
        raise UnsoundTargetError(
            f"{len(needs.missing)} chunks could not be restored beside what is in the target "
            "already, some of whose references are gone; choose another target"
        )
    live = {}
    for path, rows in union.slices():
        if path in found and needs.live[rows].any():
            needed = tuple(np.flatnonzero(needs.live[rows]).tolist())
            live[path] = replace(found[path], needed=needed)
    return live


def _as_is(backend: Backend, path: str, footer: Footer) -> Shipment:
    if is_misnamed(path, footer):
        what = backend.describe(path)
        raise CorruptedError(f"{what} holds pack {footer.check.hex()}; {REPAIR_HINT}", file=what)
    size = backend.size(path)
    return Shipment(path=path, source=path, size=size, footer=footer, records=None, end=b"")


def _selected(shipment: Shipment, sound: Rows) -> Iterator[Shipment]:
    """Yield a shipment without the records that are not sound, if any is."""
    if sound.all():
        yield shipment
        return
    numbers = np.flatnonzero(sound).tolist()
    if not numbers:
        return
    before = shipment.records or tuple(shipment.footer)
    records = tuple(before[number] for number in numbers)
    placed, position = [], PACK_HEADER.size
    for record in records:
        placed.append(replace(record, offset=position))
        position += record.length
    end, check = encode_footer(placed, position)
    path, size = pack_path(check), position + len(end)
    trailer = decode_trailer(end[-PACK_TRAILER.size :], size, path)
    footer = decode_footer(end[: trailer.length], trailer, path)
    yield Shipment(
        path=path, source=shipment.source, size=size, footer=footer, records=records, end=end
    )


def merged(parts: Iterable[tuple[str | None, Keys]]) -> dict[str | None, Keys]:
    """Return keys by base, of checkpoints that each have a base and keys."""
    found: dict[str | None, list[Keys]] = {}
    for base, keys in parts:
        found.setdefault(base, []).append(keys)
    return {base: concatenate_keys(keys) for base, keys in found.items()}
