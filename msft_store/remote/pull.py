"""From a remote into a store's directory: staged, verified, then moved to its place.

What comes is written to ``tmp/incoming`` first and stays there where the connection breaks: it does
not come again. Once all of it is verified it is moved, packs first. Who calls holds the lock.

Example::

    fetch(remote, backend, tally, bases=None, force=False, timelines=False)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from msft_store.errors import (
    BusyError,
    ConflictError,
    CorruptedError,
    NotAStoreError,
    StorageError,
    strip_hint,
)
from msft_store.format.key_table import KeyScanner
from msft_store.format.strict_json import check_id
from msft_store.objects.bases import BASES, base_path, has_missing_files, list_bases, read_base
from msft_store.objects.catalog import CONFIG, Catalog, read_level
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    list_manifests,
    manifest_path,
    read_checkpoint,
    read_keys,
    read_tensors,
)
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import Ref, list_refs, read_ref, ref_name, ref_path
from msft_store.pipeline.parallel import in_order
from msft_store.remote.backend import RemoteBackend, Staged
from msft_store.remote.bases import pull_base
from msft_store.remote.missing_packs import (
    Piece,
    Shipment,
    choose,
    lacks,
    merged,
    objects_of,
    verify,
)
from msft_store.remote.refs import RefMove, decide, left_behind, refusal, travels
from msft_store.remote.transfer import Tally
from msft_store.remote.transport.base import Remote
from msft_store.storage.backend import TEMPORARY, read_small_file, write_atomic
from msft_store.storage.overlay import Overlay
from msft_store.storage.quota import QuotaBackend

INCOMING = f"{TEMPORARY}/incoming"


def fetch(
    remote: Remote,
    backend: QuotaBackend,
    tally: Tally,
    *,
    bases: Path | None,
    force: bool,
    timelines: bool,
) -> None:
    """Fetch what a store lacks; see :func:`msft_store.remote.api.pull`.

    ``bases`` is where the files of bases go; ``None``: they are not fetched.
    """
    source = RemoteBackend(remote, nearby=backend)
    if not source.exists(CONFIG):
        raise NotAStoreError(f"no store at {remote.describe('')}; send one there with push")
    read_level(source)
    catalog = Catalog(backend)
    catalog.refresh()
    ids = _checked(source, MANIFESTS, list_manifests(source))
    refs = _refs(source, catalog, ids, timelines=timelines)
    tally.timelines_left = left_behind(map(ref_name, list_refs(source)), timelines=timelines)
    moves = _decided(refs, backend, source, ids, force=force)
    _fetch_bases(remote, backend, catalog, tally, bases)
    old = [c for c in map(catalog.get, ids) if c is not None and _has_table(catalog, c)]
    # What is damaged here comes anew, too.
    lacking = sorted(set(ids) - {checkpoint.id for checkpoint in old})
    with contextlib.ExitStack() as stack:
        # A directory that cannot be written to is fetched from all the same.
        with contextlib.suppress(BusyError, StorageError):
            stack.enter_context(remote.session("pull"))
        _Fetching(remote, source, backend, catalog, tally).run(lacking, old)
    # A pin may have come here meanwhile: what is to move is decided once more.
    if moves:
        # Those that were listed are read together.
        list_refs(source)
    for ref, before in _decided([ref for ref, _ in moves], backend, source, ids, force=force):
        _write_ref(backend, source, ref, before, tally)


class _Fetching:
    """The packs and manifests of one pull."""

    def __init__(
        self,
        remote: Remote,
        source: RemoteBackend,
        backend: QuotaBackend,
        catalog: Catalog,
        tally: Tally,
    ) -> None:
        self._remote = remote
        self._source = source
        self._backend = backend
        self._catalog = catalog
        self._tally = tally
        self._staged: dict[str, str] = {}
        """Where files are until they are moved, by the path that they will have."""
        self._found: set[str] = set()
        """Those that were staged by an earlier pull."""

    def run(self, lacking: Sequence[str], old: Sequence[Checkpoint]) -> None:
        """Fetch checkpoints that are lacking, and packs that others here lack."""
        backend, source = self._backend, self._source
        view = Staged(backend, self._staged, source.describe)
        objects, target = objects_of(source), objects_of(backend)
        checkpoints = self._manifests(lacking, view)
        scanner = KeyScanner()
        keys = [(c.base, read_keys(view, c, scanner)) for c in checkpoints]
        mended = self._catalog.keys_by_base(old)
        if lacks(self._catalog.objects, target, mended):
            keys += mended.items()
        shipments = choose(objects, source, target, merged(keys))
        backend.require_space(sum(shipment.size for shipment in shipments))
        self._stage_packs(shipments)
        try:
            unverified = self._verified(view, shipments)
        except CorruptedError:
            again = [shipment for shipment in shipments if shipment.path in self._found]
            if not again:
                raise
            # What an earlier pull left may be to blame.
            self._stage_packs(again, anew=True)
            unverified = self._verified(view, shipments)
        self._tally.unverified += unverified
        self._settle([shipment.path for shipment in shipments], PACKS)
        self._settle([manifest_path(checkpoint.id) for checkpoint in checkpoints], MANIFESTS)
        self._tally.checkpoints += [checkpoint.id for checkpoint in checkpoints]

    def _verified(self, view: Staged, shipments: Sequence[Shipment]) -> int:
        objects = objects_of(view)
        try:
            return verify(objects, shipments, self._tally, come=True)
        except CorruptedError as error:
            raise CorruptedError(
                f"{strip_hint(error)}; nothing of it was kept. Who has that checkpoint whole can "
                "remove the file there and push it again",
                file=error.file,
            ) from None

    def _manifests(self, identities: Sequence[str], view: Staged) -> list[Checkpoint]:
        """Stage and verify manifests; return their checkpoints, oldest first."""
        wanted = []
        for identity in identities:
            path = manifest_path(identity)
            staged = f"{INCOMING}/{path}"
            self._staged[path] = staged
            if not (self._backend.exists(staged) and _is_sound(view, identity)):
                wanted.append(path)

        def get(path: str) -> tuple[str, bytes]:
            return path, read_small_file(self._source, path)

        with contextlib.closing(in_order(get, iter(wanted), self._remote.workers)) as come:
            for path, data in come:
                write_atomic(self._backend, self._staged[path], data)
                self._tally.went(len(data))
        checkpoints = [read_checkpoint(view, identity) for identity in identities]
        for checkpoint in checkpoints:
            read_tensors(view, checkpoint)
        return sorted(checkpoints, key=lambda c: (c.created, c.id))

    def _stage_packs(self, shipments: Sequence[Shipment], *, anew: bool = False) -> None:
        wanted = []
        for shipment in shipments:
            staged = f"{INCOMING}/{shipment.path}"
            self._staged[shipment.path] = staged
            there = self._backend.exists(staged) and self._backend.size(staged) == shipment.size
            if there and not anew:
                self._found.add(shipment.path)
            else:
                wanted.append(shipment)
        self._tally.begin("fetch", sum(shipment.size for shipment in wanted))
        pieces = ((shipment, piece) for shipment in wanted for piece in shipment.pieces())

        def get(one: tuple[Shipment, Piece]) -> bytes:
            return one[0].get(self._source, one[1])

        # Also across packs: most are small, and a request takes its time.
        with contextlib.closing(in_order(get, pieces, self._remote.workers)) as come:
            for shipment in wanted:
                with self._backend.writer() as writer:
                    for _ in shipment.pieces():
                        part = next(come)
                        writer.write(part)
                        self._tally.passed(len(part))
                    writer.finalize(self._staged[shipment.path])
                self._tally.went(shipment.size, pack=True)

    def _settle(self, paths: Sequence[str], folder: str) -> None:
        for path in paths:
            staged = self._staged.pop(path)
            # Another pull may have moved it, which fetched the same.
            if self._backend.exists(staged) or not self._backend.exists(path):
                self._backend.move(staged, path)
        # Also what was there: its writer may have been killed before that was durable.
        self._backend.sync(folder)


def _checked(source: RemoteBackend, folder: str, identities: Sequence[str]) -> list[str]:
    """Return ids; :class:`CorruptedError` for a name that is none, which could lead elsewhere."""
    for identity in identities:
        try:
            check_id(identity)
        except ValueError as error:
            what = source.describe(f"{folder}/{identity}.json")
            raise CorruptedError(f"{what!a:.300} has no business there: {error}") from None
    return list(identities)


def _has_table(catalog: Catalog, checkpoint: Checkpoint) -> bool:
    try:
        catalog.keys(checkpoint)
    except CorruptedError:
        return False
    return True


def _is_sound(view: Staged, identity: str) -> bool:
    try:
        read_tensors(view, read_checkpoint(view, identity))
    except CorruptedError:
        return False
    return True


def _fetch_bases(
    remote: Remote, backend: QuotaBackend, catalog: Catalog, tally: Tally, folder: Path | None
) -> None:
    source = RemoteBackend(remote)
    known = catalog.objects.bases()
    for identity in _checked(source, BASES, list_bases(source)):
        path = base_path(identity)
        if folder is not None and (identity not in known or has_missing_files(known[identity])):
            _, record, came = pull_base(remote, identity, folder, tally)
            write_atomic(backend, path, record)
            tally.base_bytes += came
            tally.went(len(record), base=True)
        elif identity not in known:
            record = read_small_file(source, path)
            overlay = Overlay(source)
            overlay.replaced[path] = record
            read_base(overlay, identity)
            write_atomic(backend, path, record)
            tally.went(len(record), base=True)
    backend.sync(BASES)
    catalog.objects.refresh()


def _refs(
    source: RemoteBackend, catalog: Catalog, ids: Sequence[str], *, timelines: bool
) -> list[Ref]:
    there = set(ids)
    paths = [p for p in list_refs(source) if travels(ref_name(p), timelines=timelines)]
    refs = []
    for path in paths:
        ref = read_ref(source, path)
        # One that was pushed since the manifests were listed comes with the next pull.
        if ref.checkpoint in there or catalog.get(ref.checkpoint) is not None:
            refs.append(ref)
    return refs


def _decided(
    refs: Sequence[Ref],
    backend: QuotaBackend,
    source: RemoteBackend,
    ids: Sequence[str],
    *,
    force: bool,
) -> list[tuple[Ref, Ref | None]]:
    """Return the refs to be written, and what they are here; refuse what others moved."""
    here, there, known = backend.describe(""), source.describe(""), set(ids)
    moves, reasons = [], []
    for ref in refs:
        path = ref_path(ref.name)
        try:
            mine = read_ref(backend, path) if backend.exists(path) else None
        except CorruptedError:
            if not force:
                raise
            mine = None
        decision = decide(ref, mine, known=known, force=force)
        if decision == "refuse" and mine is not None:
            names = {"here": there.rstrip("/"), "there": here.rstrip("/")}
            reasons.append(refusal(ref, mine, **names))
        elif decision != "same":
            moves.append((ref, mine))
    if reasons:
        raise ConflictError(
            f"{'; '.join(reasons)}. It was moved here: push, or pull --force to move it"
        )
    return moves


def _write_ref(
    backend: QuotaBackend, source: RemoteBackend, ref: Ref, before: Ref | None, tally: Tally
) -> None:
    data = read_small_file(source, ref_path(ref.name))
    overlay = Overlay(source)
    overlay.replaced[ref_path(ref.name)] = data
    if read_ref(overlay, ref_path(ref.name)) != ref:
        return
    write_atomic(backend, ref_path(ref.name), data)
    tally.went(len(data))
    old = None if before is None else before.checkpoint
    tally.refs.append(RefMove(name=ref.name, before=old, after=ref.checkpoint))
