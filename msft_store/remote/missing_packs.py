"""Select the packs that another store is missing, and the records of them that are transferred.

Invariant: if all records of the target refer to existing records before the transfer, they do so
afterwards. A pack may hold records that no checkpoint needs and whose references were deleted by gc
or are not transferred. In the target, such a record could be preferred to a sound one of the same
chunk. A pack with such records is therefore transferred without them, as another pack whose name
follows from the remaining records: the same selection always gives the same pack.

Example::

    for pack in select_packs(source, backend, target, catalog.keys_by_base(checkpoints)):
        remote.put(pack.path, partial(pack.read_parts, backend), pack.size)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from msft_store.errors import REPAIR_HINT, BaseError, CorruptedError, StoreError
from msft_store.format.key_table import Keys, view_keys
from msft_store.format.layout import MAX_DEPTH, NEWEST, Record
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
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import PART_BYTES, check_length, split_ranges
from msft_store.storage.backend import Backend

Rows = NDArray[np.bool_]
Segment = bytes | tuple[int, int]
"""Part of a transferred pack: its bytes, or their offset and length in the source's pack."""


class UnsoundTargetError(StoreError):
    """Incomplete records in the target would be preferred to the records of the transfer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackTransfer:
    """A pack that is transferred, either unchanged or as a selection of a source's pack."""

    path: str
    source: str
    """Path of the pack in the source from which the bytes are read."""
    size: int
    footer: Footer
    """The footer of the pack in the target."""
    records: tuple[Record, ...] | None
    """The selected records of the source's pack; ``None`` if the pack is transferred unchanged."""
    end: bytes
    """Footer and trailer of a selection as bytes."""
    needed: tuple[int, ...] = ()
    """Numbers of the records that checkpoints need."""

    def segments(self) -> Iterator[Segment]:
        """Yield the segments of the pack in order."""
        if self.records is None:
            yield from split_ranges(self.size)
            return
        yield pack_header(self.footer.version)
        yield from _merge_ranges(self.records)
        yield self.end

    def read_segment(self, backend: Backend, segment: Segment) -> bytes:
        """Return the bytes of a segment; ``backend`` is the source's."""
        if isinstance(segment, bytes):
            return segment
        data = backend.read(self.source, *segment)
        return check_length(data, segment[1], backend.describe(self.source))

    def read_parts(self, backend: Backend) -> Iterator[bytes]:
        """Yield the bytes of the pack; ``backend`` is the source's."""
        for segment in self.segments():
            yield self.read_segment(backend, segment)

    def needed_records(self, *, at_target: bool) -> Iterator[StoredChunk]:
        """Yield the needed records with their places in the target, or in the source."""
        selected = None if at_target else self.records
        for number in self.needed:
            record = self.footer.record(number) if selected is None else selected[number]
            yield StoredChunk(pack=self.path if at_target else self.source, record=record)


def _merge_ranges(records: Iterable[Record]) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of records, merging adjacent records up to the size of a request."""
    start = end = 0
    for record in records:
        if record.offset != end or record.offset + record.length - start > PART_BYTES:
            if end > start:
                yield start, end - start
            start = record.offset
        end = record.offset + record.length
    if end > start:
        yield start, end - start


def select_packs(
    source: ChunkStore, backend: Backend, target: ChunkStore, keys: Mapping[str | None, Keys]
) -> list[PackTransfer]:
    """Return the packs of which a target needs records in order to restore chunks.

    ``keys`` holds the chunks of checkpoints by their base. ``backend`` is the source's. Raises
    :class:`CorruptedError` if the source is missing chunks, and :class:`UnsoundTargetError` if the
    target holds incomplete records that would be preferred.
    """
    missing = find_reachable(source, source.index, keys).missing
    if len(missing):
        hint = "".join(f"; {error}" for error in source.damaged.values())
        raise CorruptedError(
            f"{len(missing)} chunks that checkpoints of {backend.describe('')} need are in no "
            f"pack{hint}; {REPAIR_HINT}"
        )
    existing = target.packs
    packs = {
        path: _describe_pack(backend, path, footer)
        for path, footer in source.packs.items()
        if path not in existing
    }
    # A record is complete in the source first, and then also in the target after the transfer.
    packs = _select_complete(source, packs, existing, source.index)
    packs = _select_needed(source, packs, existing, keys)
    packs = _select_complete(source, packs, existing, _merge_packs(existing, packs))
    return list(_select_needed(source, packs, existing, keys).values())


def _merge_packs(existing: Mapping[str, Footer], packs: Mapping[str, PackTransfer]) -> PackIndex:
    """Return the index of the target after the transfer."""
    return PackIndex({**existing, **{path: pack.footer for path, pack in packs.items()}})


def _select_complete(
    source: ChunkStore,
    packs: Mapping[str, PackTransfer],
    existing: Mapping[str, Footer],
    index: PackIndex,
) -> dict[str, PackTransfer]:
    """Return the packs without the records whose references are not in the index."""
    complete, rows = find_complete_records(source, index), dict(index.slices())
    return {
        selected.path: selected
        for path, pack in packs.items()
        for selected in _select_records(pack, complete[rows[path]])
        if selected.path not in existing
    }


def is_missing_chunks(
    source: ChunkStore, target: ChunkStore, keys: Mapping[str | None, Keys]
) -> bool:
    """Return True if a target is missing records, or copies of a base's chunks, that keys need."""
    if len(find_reachable(source, target.index, keys).missing):
        return True
    return any(
        len(source.find_needed(target.index, some, base)[0])
        < len(source.find_needed(source.index, some, base)[0])
        for base, some in keys.items()
    )


def find_complete_records(objects: ChunkStore, index: PackIndex) -> Rows:
    """Return a mask of the index's rows whose references all exist, down to records without any."""
    complete = ~index.refers_to_chunk
    bases = objects.bases()
    for depth in range(1, MAX_DEPTH[NEWEST] + 1):
        here = np.flatnonzero(index.refers_to_chunk & (index.depths == depth))
        for number in np.unique(index.bases[here]).tolist():
            base = index.base_of(number)
            if base is not None and base not in bases:
                continue
            rows = here[index.bases[here] == number]

            def is_resolved(keys: Keys, base: str | None = base, depth: int = depth) -> Rows:
                found = index.find_all(keys, base)
                known: Rows = (found >= 0) & (index.depths[found] < depth) & complete[found]
                return known | objects.mask_in_base(keys, base)

            plain = rows[~index.explicit[rows]]
            complete[plain] = is_resolved(index.ref_keys[plain])
            for row in rows[index.explicit[rows]].tolist():
                complete[row] = bool(
                    is_resolved(view_keys(b"".join(index.explicit_keys(row)))).all()
                )
    return complete


def verify_packs(
    objects: ChunkStore, packs: Sequence[PackTransfer], counter: TransferCounter, *, at_target: bool
) -> int:
    """Verify the needed records of packs; return the number of those that cannot be decoded here.

    Each chunk is decoded and compared with its key. A chunk cannot be decoded if its base is not on
    this machine. Records are read in the target if ``at_target`` is true, else in the source.
    :class:`CorruptedError` names a damaged file.
    """

    def list_records() -> Iterator[StoredChunk]:
        for pack in packs:
            yield from pack.needed_records(at_target=at_target)

    counter.start_step("verify", sum(one.record.length for one in list_records()))

    def verify(one: StoredChunk) -> bool:
        counter.advance(one.record.length)
        try:
            objects.verify(one)
        except BaseError:
            return False
        return True

    with contextlib.closing(in_order(verify, list_records())) as results:
        return sum(not ok for ok in results)


def _select_needed(
    source: ChunkStore,
    found: Mapping[str, PackTransfer],
    existing: Mapping[str, Footer],
    keys: Mapping[str | None, Keys],
) -> dict[str, PackTransfer]:
    """Return the packs that have needed records, with the numbers of these."""
    union = _merge_packs(existing, found)
    needs = find_reachable(source, union, keys)
    if len(needs.missing):
        raise UnsoundTargetError(
            f"{len(needs.missing)} chunks could not be restored in the target, because it holds "
            "records of them whose references were deleted; choose another target"
        )
    live = {}
    for path, rows in union.slices():
        if path in found and needs.live[rows].any():
            needed = tuple(np.flatnonzero(needs.live[rows]).tolist())
            live[path] = replace(found[path], needed=needed)
    return live


def _describe_pack(backend: Backend, path: str, footer: Footer) -> PackTransfer:
    if is_misnamed(path, footer):
        what = backend.describe(path)
        raise CorruptedError(f"{what} holds pack {footer.check.hex()}; {REPAIR_HINT}", file=what)
    size = backend.size(path)
    return PackTransfer(path=path, source=path, size=size, footer=footer, records=None, end=b"")


def _select_records(pack: PackTransfer, complete: Rows) -> Iterator[PackTransfer]:
    """Yield the pack with only its complete records; nothing if it has none."""
    if complete.all():
        yield pack
        return
    numbers = np.flatnonzero(complete).tolist()
    if not numbers:
        return
    before = pack.records or tuple(pack.footer)
    records = tuple(before[number] for number in numbers)
    placed, position = [], PACK_HEADER.size
    for record in records:
        placed.append(replace(record, offset=position))
        position += record.length
    end, check = encode_footer(placed, position)
    path, size = pack_path(check), position + len(end)
    trailer = decode_trailer(end[-PACK_TRAILER.size :], size, path)
    footer = decode_footer(end[: trailer.length], trailer, path, pack.footer.version)
    yield PackTransfer(
        path=path, source=pack.source, size=size, footer=footer, records=records, end=end
    )
