"""Fetch the files of a remote into a store's directory: stage, verify, then move them into place.

Fetched files are written to ``tmp/incoming`` first. If the connection breaks they stay there, and
the next pull does not fetch them again. After all files are verified they are moved, packs before
manifests. The caller holds the store's lock.

Example::

    pull_store(remote, backend, counter, bases=None, force=False, timelines=False)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msft_store.errors import (
    BusyError,
    CorruptedError,
    InvalidInputError,
    StorageError,
    strip_hint,
)
from msft_store.format.strict_json import check_id
from msft_store.objects.bases import BASES, base_path, has_missing_files, list_bases, read_base
from msft_store.objects.catalog import Catalog, read_config
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    list_manifests,
    manifest_path,
)
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import Ref, list_refs, parse_ref, read_ref, ref_path
from msft_store.pipeline.parallel import in_order
from msft_store.remote.backend import (
    RemoteBackend,
    StagedBackend,
    is_sound,
    require_store,
    require_version,
)
from msft_store.remote.bases import pull_base
from msft_store.remote.missing_packs import (
    PackTransfer,
    Segment,
    is_missing_chunks,
    select_packs,
    verify_packs,
)
from msft_store.remote.refs import RefPair, RefRule, split_names
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import Remote
from msft_store.storage.backend import TEMPORARY, read_small_file, write_atomic
from msft_store.storage.overlay import Overlay
from msft_store.storage.quota import QuotaBackend

_log = logging.getLogger(__name__)

INCOMING = f"{TEMPORARY}/incoming"


def pull_store(
    remote: Remote,
    backend: QuotaBackend,
    counter: TransferCounter,
    *,
    bases: Path | None,
    force: bool,
    timelines: bool,
) -> None:
    """Fetch the files that a store is missing; see :func:`~.api.pull`.

    The files of base models go to the directory ``bases``; they are not fetched if it is ``None``.
    """
    source = require_store(RemoteBackend(remote, nearby=backend))
    catalog = Catalog(backend)
    catalog.refresh()
    require_version(read_config(source), source, catalog.config, backend)
    ids = _check_ids(source, MANIFESTS, list_manifests(source))
    names, left = split_names(list_refs(source), timelines=timelines)
    counter.set_left(timelines_left=left)
    rule = RefRule(
        known=set(ids),
        force=force,
        source=source.describe(""),
        target=backend.describe(""),
        advice="It was moved here: push, or pull --force to move it",
    )
    pull = _Pull(remote, source, backend, catalog, counter, rule)
    refs = [read_ref(source, ref_path(name)) for name in names]
    # A ref may point to a checkpoint that was pushed after the manifests were listed.
    refs = [r for r in refs if r.checkpoint in rule.known or catalog.get(r.checkpoint) is not None]
    moves = pull.select_moves(refs)
    pull.fetch_bases(bases)
    with contextlib.ExitStack() as stack:
        # A directory that this process cannot lock, because it is read-only, can still be read.
        with contextlib.suppress(BusyError, StorageError):
            stack.enter_context(remote.session("pull"))
        pull.fetch_checkpoints(ids)
    if moves:
        # Listing the refs makes the source read all of them in parallel.
        list_refs(source)
    catalog.refresh()
    # Another process may have moved refs of this store during the transfer: compare them again.
    for ref, before in pull.select_moves([ref for ref, _ in moves]):
        pull.write_ref(ref, before)


@dataclass
class _Pull:
    """One pull from a remote into a store."""

    remote: Remote
    source: RemoteBackend
    backend: QuotaBackend
    catalog: Catalog
    counter: TransferCounter
    rule: RefRule
    _staged: dict[str, str] = field(default_factory=dict)
    """The staged path of each file, by its final path."""
    _reused: set[str] = field(default_factory=set)
    """Final paths of the packs that an earlier pull staged."""

    def fetch_bases(self, folder: Path | None) -> None:
        """Fetch the records of bases, and into a folder also the missing files of models."""
        known, source = self.catalog.objects.bases(), RemoteBackend(self.remote)
        for identity in _check_ids(source, BASES, list_bases(source)):
            path = base_path(identity)
            if folder is not None and (identity not in known or has_missing_files(known[identity])):
                record, size = pull_base(self.remote, identity, folder, self.counter)
                self.counter.add(base_bytes=size)
            elif identity not in known:
                record = read_small_file(source, path)
                read_base(Overlay(source, {path: record}), identity)
            else:
                continue
            write_atomic(self.backend, path, record)
            self.counter.add(bytes=len(record), bases=1)
        self.backend.sync(BASES)
        self.catalog.objects.refresh()

    def fetch_checkpoints(self, ids: Sequence[str]) -> None:
        """Fetch missing checkpoints, and packs that checkpoints of this store are missing."""
        backend, source = self.backend, self.source
        view = StagedBackend(backend, self._staged, source.describe)
        objects, target = ChunkStore(source), ChunkStore(backend)
        old = [c for c in map(self.catalog.get, ids) if c is not None and self._has_key_table(c)]
        # Checkpoints whose key table is damaged in this store are fetched again.
        missing = sorted(set(ids) - {checkpoint.id for checkpoint in old})
        checkpoints = self._stage_manifests(missing, view)
        old_keys = self.catalog.keys_by_base(old)
        incomplete = is_missing_chunks(self.catalog.objects, target, old_keys)
        keys = Catalog(view).keys_by_base([*(old if incomplete else ()), *checkpoints])
        packs = select_packs(objects, source, target, keys)
        backend.require_space(sum(pack.size for pack in packs))
        self._stage_packs(packs)
        try:
            unverified = self._verify(view, packs)
        except CorruptedError as error:
            reused = [pack for pack in packs if pack.path in self._reused]
            if not reused:
                raise
            # The damage may be in a pack that an earlier pull staged.
            _log.info("%s: fetching %d staged packs again", error, len(reused))
            self._stage_packs(reused, reuse=False)
            unverified = self._verify(view, packs)
        self.counter.add(unverified=unverified)
        self._move_into_place([pack.path for pack in packs], PACKS)
        self._move_into_place([manifest_path(c.id) for c in checkpoints], MANIFESTS)
        self.counter.add(checkpoints=tuple(checkpoint.id for checkpoint in checkpoints))

    def _has_key_table(self, checkpoint: Checkpoint) -> bool:
        try:
            self.catalog.keys(checkpoint)
        except CorruptedError:
            return False
        return True

    def _verify(self, view: StagedBackend, packs: Sequence[PackTransfer]) -> int:
        objects = ChunkStore(view)
        try:
            return verify_packs(objects, packs, self.counter, at_target=True)
        except CorruptedError as error:
            raise CorruptedError(
                f"{strip_hint(error)}; nothing of the pull was kept. If another store has that "
                "checkpoint undamaged, delete the file on the remote and push from that store",
                file=error.file,
            ) from None

    def _stage_manifests(self, identities: Sequence[str], view: StagedBackend) -> list[Checkpoint]:
        """Stage and verify manifests; return their checkpoints, oldest first."""
        missing, verify = [], self.catalog.tables.verify
        for identity in identities:
            path = manifest_path(identity)
            self._staged[path] = staged = f"{INCOMING}/{path}"
            if not (self.backend.exists(staged) and is_sound(verify, view, identity)):
                missing.append(path)

        def fetch(path: str) -> tuple[str, bytes]:
            return path, read_small_file(self.source, path)

        with contextlib.closing(in_order(fetch, iter(missing), self.remote.workers)) as fetched:
            for path, data in fetched:
                write_atomic(self.backend, self._staged[path], data)
                self.counter.add(bytes=len(data))
        checkpoints = [verify(view, identity) for identity in identities]
        return sorted(checkpoints, key=lambda c: (c.created, c.id))

    def _stage_packs(self, packs: Sequence[PackTransfer], *, reuse: bool = True) -> None:
        missing = []
        for pack in packs:
            self._staged[pack.path] = staged = f"{INCOMING}/{pack.path}"
            exists = self.backend.exists(staged) and self.backend.size(staged) == pack.size
            if exists and reuse:
                self._reused.add(pack.path)
            else:
                missing.append(pack)
        if self._reused and reuse:
            _log.info("resuming a pull: %d packs are staged already", len(self._reused))
        self.counter.start_step("fetch", sum(pack.size for pack in missing))
        segments = ((pack, segment) for pack in missing for segment in pack.segments())

        def fetch(one: tuple[PackTransfer, Segment]) -> bytes:
            return one[0].read_segment(self.source, one[1])

        # Requests run in parallel across packs too, because most packs are small.
        with contextlib.closing(in_order(fetch, segments, self.remote.workers)) as fetched:
            for pack in missing:
                with self.backend.writer() as writer:
                    for _ in pack.segments():
                        part = next(fetched)
                        writer.write(part)
                        self.counter.advance(len(part))
                    writer.finalize(self._staged[pack.path])
                self.counter.add(bytes=pack.size, packs=1)

    def _move_into_place(self, paths: Sequence[str], folder: str) -> None:
        for path in paths:
            staged = self._staged.pop(path)
            # A concurrent pull shares the staged files and may have moved this one already.
            if self.backend.exists(staged) or not self.backend.exists(path):
                self.backend.move(staged, path)
        # Also sync files that existed before: their writer may have been killed before its sync.
        self.backend.sync(folder)

    def select_moves(self, refs: Sequence[Ref]) -> list[RefPair]:
        """Return the refs to be written, each with this store's ref of the same name."""
        return self.rule.select([(ref, self._read_own_ref(ref.name)) for ref in refs])

    def _read_own_ref(self, name: str) -> Ref | None:
        path = ref_path(name)
        try:
            return read_ref(self.backend, path) if self.backend.exists(path) else None
        except CorruptedError:
            if not self.rule.force:
                raise
            return None

    def write_ref(self, ref: Ref, before: Ref | None) -> None:
        path = ref_path(ref.name)
        try:
            if before is None:
                self.catalog.check_not_an_id(ref.name, ref.checkpoint)
        except InvalidInputError as error:
            _log.warning("%s is left out: %s at the remote", self.source.describe(path), error)
            return
        data = read_small_file(self.source, path)
        if parse_ref(data, path, self.source.describe(path)) != ref:
            # The ref was moved since it was listed. The next pull fetches its checkpoint too.
            return
        write_atomic(self.backend, path, data)
        self.counter.add_ref(before, ref, len(data), self.backend.describe(""))


def _check_ids(source: RemoteBackend, folder: str, identities: Sequence[str]) -> list[str]:
    """Return ids; raise CorruptedError for other names, which could lead to other folders."""
    for identity in identities:
        try:
            check_id(identity)
        except ValueError as error:
            path = source.describe(f"{folder}/{identity}.json")
            raise CorruptedError(f"{path!a:.300} does not belong in a store: {error}") from None
    return list(identities)
