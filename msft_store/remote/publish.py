"""Send a version of weights to a place where followers read it.

A version is a checkpoint of the publisher's store. Beside its packs, which a bounded chain of
references leads to, goes a pack of the changes from the version before, unless those packs hold
just these changes. Files are written in the order of a push, the ref of the latest version last and
only if it still points to a checkpoint of this store (a conditional write).

Example::

    publication = Publication(catalog, remote, "policy")
    note = publication.send(checkpoint, before, step=40)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msft_store.codec import codecs
from msft_store.errors import ConflictError, CorruptedError
from msft_store.format.dtypes import DType
from msft_store.format.layout import KEY_BYTES, NEWEST, Record
from msft_store.format.pack_footer import encode_footer, pack_header
from msft_store.maintenance.gc import evict
from msft_store.objects.catalog import Catalog
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import Checkpoint, TensorEntry, chunks_of
from msft_store.objects.reachability import find_reachable
from msft_store.objects.refs import LEASES, Ref, delete_ref, has_ended, parse_ref, ref_path
from msft_store.pipeline.parallel import in_order
from msft_store.remote.backend import RemoteBackend
from msft_store.remote.bases import has_base, push_base
from msft_store.remote.push import Push, refuse_itself
from msft_store.remote.refs import RefRule
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import Remote, as_parts
from msft_store.remote.versions import LATEST, STEPS, Advice, version_ref
from msft_store.retention import Candidate, Policy, check_policy, check_ranked_metrics
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES, Backend


class Publication:
    """One version on its way from a store to a place."""

    def __init__(self, catalog: Catalog, remote: Remote, name: str) -> None:
        """Prepare a version of a name; the caller holds the lock of the store."""
        self.directory: Backend | None = getattr(remote, "backend", None)
        """The place if it is a directory, where files can be deleted."""
        refuse_itself(self.directory, Path(catalog.backend.describe("")))
        self._catalog, self._remote, self._name = catalog, remote, name
        self._push: Push | None = None

    def find_before(self, refs: Mapping[str, Ref]) -> Checkpoint | None:
        """Return the version before, by the refs of the store.

        :class:`ConflictError` if the place has a version that the store does not know.
        """
        name = version_ref(self._name, LATEST)
        found = self._remote.read_versioned(ref_path(name), MAX_SMALL_FILE_BYTES)
        if found is not None:
            there = parse_ref(found[0], ref_path(name), self._remote.describe(ref_path(name)))
            if self._catalog.get(there.checkpoint) is None:
                raise ConflictError(
                    f"another store published {self._name!r} at {self._remote.describe('')}: its "
                    f"latest version is {there.checkpoint[:12]}, which this store does not have. "
                    "Publish under another name, or pull from there first to go on from it"
                )
        return self._catalog.resolve(refs[name].checkpoint) if name in refs else None

    def send(self, checkpoint: Checkpoint, before: Checkpoint | None, step: int) -> dict[str, Any]:
        """Send all files of a checkpoint; return the note of its refs.

        The checkpoint can be followed once :meth:`send_ref` has sent a ref to it.
        """
        catalog, remote, counter = self._catalog, self._remote, TransferCounter()
        rule = RefRule(
            known={one.id for one in catalog.checkpoints()},
            force=False,
            source=catalog.backend.describe(""),
            target=remote.describe(""),
            advice="Another store publishes there: publish under another name",
        )
        self._push = push = Push(catalog, remote, counter, rule)
        push.ensure_store()
        with remote.session("publish"):
            push.send_bases()
            if checkpoint.base is not None and not has_base(remote, checkpoint.base):
                push_base(remote, catalog.objects.base(checkpoint.base).base, counter)
            push.send_checkpoints([checkpoint])
            files = RemoteBackend(remote, nearby=catalog.backend)
            there, keys = ChunkStore(files), catalog.keys_by_base([checkpoint])
            live = find_reachable(there, there.index, keys).live
            needed = [path for path, rows in there.index.slices() if live[rows].any()]
            changes = [] if before is None else self._send_changes(there, checkpoint, before)
            advice = Advice(
                packs={path: files.size(path) for path in needed},
                before=None if before is None else before.id,
                changes={path: files.size(path) for path in changes},
            )
        return advice.to_note(step)

    def send_ref(self, ref: Ref) -> None:
        """Point a ref of the place to its checkpoint, after :meth:`send`."""
        if self._push is not None:
            self._push.send_ref(ref)

    def _send_changes(
        self, there: ChunkStore, checkpoint: Checkpoint, before: Checkpoint
    ) -> list[str]:
        """Return the packs that suffice for who holds the version before; send one if needed."""
        catalog = self._catalog
        base, held = checkpoint.base, set(_keys(catalog, before))
        places = {
            place.key: place
            for place in _list_changes(catalog.tensors(checkpoint), catalog.tensors(before))
            if place.key not in held and catalog.objects.find_in_base(place.key, base) is None
        }
        found = [there.find(key, base) for key in places]
        if all(one is not None and held.issuperset(one.record.chunk_keys) for one in found):
            return sorted({one.pack for one in found if one is not None})
        path, data = encode_changes(catalog, base, list(places.values()))
        if self._remote.size(path) != len(data):
            self._remote.put(path, *as_parts(data))
        self._remote.sync(STEPS)
        return [path]

    def drop_changes(self, refs: Mapping[str, Ref]) -> None:
        """Delete the packs of changes in a directory that no follower needs.

        Needed are those of the latest version, and those from a version that a follower leases. Who
        holds another version decodes from the packs of the chain.
        """
        if self.directory is None:
            return
        start, latest = version_ref(self._name, ""), refs[version_ref(self._name, LATEST)]
        sent = {path for path in self.directory.list(STEPS) if path.endswith(".pack")}
        if sent <= latest.note["changes"].keys():
            return
        leased = _list_leased(Catalog(self.directory).refs())
        mine: set[str] = set()
        needed: set[str] = set()
        for ref in (ref for name, ref in refs.items() if name.startswith(start)):
            packs = ref.note["changes"].keys()
            mine |= packs
            if ref.checkpoint == latest.checkpoint or ref.note["before"] in leased:
                needed |= packs
        for path in sent & mine - needed:
            self.directory.delete(path)

    def drop(self, policy: Policy, refs: Mapping[str, Ref]) -> dict[str, str]:
        """Withdraw the versions that a policy drops from a directory.

        Return the refs of the store that it drops, with the ids of their checkpoints. A version
        that a follower leases at the directory stays.
        """
        check_policy(policy)
        start, latest = version_ref(self._name, ""), version_ref(self._name, LATEST)
        there = None if self.directory is None else Catalog(self.directory)
        others = {} if there is None else there.refs()
        leased = _list_leased(others)
        versions = {
            ref.checkpoint: ref
            for name, ref in refs.items()
            if name.startswith(start) and name != latest
        }
        known = sorted(map(self._catalog.resolve, versions), key=lambda one: one.created)
        candidates = [
            Candidate(
                id=one.id,
                metrics=one.metrics,
                stored_bytes=one.stored_bytes,
                index=index,
                pinned="the latest version"
                if one.id == refs[latest].checkpoint
                else "leased by a follower"
                if one.id in leased
                else None,
                step=one.step,
            )
            for index, one in enumerate(known)
        ]
        check_ranked_metrics(policy, [one.metrics for one in candidates])
        kept = policy.decide(candidates)
        dropped = {ref.name: one for one, ref in versions.items() if one not in kept}
        if there is not None and self.directory is not None and dropped:
            for name in dropped.keys() & others.keys():
                delete_ref(self.directory, name)
            for name in dropped:
                for path in refs[name].note.get("changes", ()):
                    if path.startswith(f"{STEPS}/"):
                        self.directory.delete(path)
            evict(there, list(dropped.values()))
        return dropped


@dataclass(frozen=True, kw_only=True)
class ChangedChunk:
    """A chunk of a version, and the key of the chunk that the version before has in its place."""

    key: bytes
    before: bytes | None
    size: int
    dtype: DType


def encode_changes(
    catalog: Catalog, base: str | None, chunks: Sequence[ChangedChunk]
) -> tuple[str, bytes]:
    """Return the path and the bytes of a pack of chunks as changes from the version before.

    Its records refer to chunks of that version and to nothing else, so it can be deleted alone.
    """
    objects = catalog.objects

    def encode(chunk: ChangedChunk) -> tuple[Record, bytes]:
        data = objects.read(chunk.key, chunk.size, chunk.dtype, base)
        old, found = None, None
        if chunk.before is not None:
            old = objects.read(chunk.before, chunk.size, chunk.dtype, base)
            found = codecs.find_changes(data, old, chunk.dtype)
        codec, payload = codecs.encode(data, old, chunk.dtype, found=found)
        out = np.empty_like(data) if old is None else old
        if not codec.restores(payload, data, out, chunk.dtype, found):
            raise CorruptedError(
                f"the {codec.name} codec did not restore a chunk of {chunk.size} bytes; nothing "
                "was published. This is a fault of the program or of the memory"
            )
        refers = codec.needs_reference and chunk.before is not None
        record = Record(
            key=chunk.key,
            offset=0,
            length=len(payload),
            size=chunk.size,
            codec=codec.code,
            dtype=chunk.dtype.code,
            depth=int(refers),
            base=None,
            ref_key=chunk.before if refers and chunk.before else bytes(KEY_BYTES),
        )
        return record, payload

    header = pack_header(NEWEST)
    parts, records, position = [header], [], len(header)
    with contextlib.closing(in_order(encode, iter(chunks))) as encoded:
        for record, payload in encoded:
            records.append(replace(record, offset=position))
            parts.append(payload)
            position += len(payload)
    footer, check = encode_footer(records, position)
    return f"{STEPS}/{check.hex()}.pack", b"".join([*parts, footer])


def _list_leased(refs: Mapping[str, Ref]) -> set[str]:
    """Return the ids of the checkpoints that followers lease now, by the refs of the place."""
    now = time.time_ns()
    return {
        ref.checkpoint
        for name, ref in refs.items()
        if name.startswith(LEASES) and not has_ended(ref, now)
    }


def _keys(catalog: Catalog, checkpoint: Checkpoint) -> Iterator[bytes]:
    for entry in catalog.tensors(checkpoint).values():
        for key, _ in entry.chunks():
            yield key


def _list_changes(
    tensors: Mapping[str, TensorEntry], before: Mapping[str, TensorEntry]
) -> Iterator[ChangedChunk]:
    """Yield the chunks of a version with those of the version before in the same places."""
    for name, entry in tensors.items():
        other = before.get(name)
        same = other is not None and other.dtype == entry.dtype
        old = {(p.offset, p.shape): p.keys for p in other.pieces} if other and same else {}
        for piece in entry.pieces:
            keys = old.get((piece.offset, piece.shape))
            for number, (key, size) in enumerate(chunks_of(piece, entry.dtype)):
                yield ChangedChunk(
                    key=key,
                    before=None if keys is None else keys[number],
                    size=size,
                    dtype=entry.dtype,
                )
