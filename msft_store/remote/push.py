"""Send the files that a remote is missing, in the order that the format requires.

Example::

    push_store(catalog, remote, counter, with_base=False, force=False, timelines=False)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from msft_store.errors import (
    REPAIR_HINT,
    ConflictError,
    CorruptedError,
    NotAStoreError,
    strip_frames,
)
from msft_store.objects.bases import BASES, base_path, list_bases, read_base
from msft_store.objects.catalog import CONFIG, Catalog, read_level
from msft_store.objects.manifest import MANIFESTS, Checkpoint, manifest_path
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import REFS, Ref, list_refs, read_ref, ref_name, ref_path
from msft_store.remote.backend import (
    RemoteBackend,
    is_sound,
    map_parallel,
    parse_as,
    read_manifest,
)
from msft_store.remote.bases import push_base
from msft_store.remote.missing_packs import (
    PackTransfer,
    is_missing_chunks,
    read_objects,
    select_packs,
    verify_packs,
)
from msft_store.remote.refs import (
    RefMove,
    count_skipped_timelines,
    is_transferred,
    select_refs_to_move,
)
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import Remote, as_parts
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES, TEMPORARY, Backend, read_small_file
from msft_store.storage.lock_files import LOCKS

_log = logging.getLogger(__name__)

_IGNORED = (f"{LOCKS}/", f"{TEMPORARY}/")
"""Folders that may exist in a place that is not a store yet."""
_REF_ATTEMPTS = 5
"""Number of attempts to write a ref that other processes write at the same time."""


def push_store(
    catalog: Catalog,
    remote: Remote,
    counter: TransferCounter,
    *,
    with_base: bool,
    force: bool,
    timelines: bool,
) -> None:
    """Send the files of a store that a remote is missing; see :func:`~.api.push`."""
    backend = catalog.backend
    catalog.refresh()
    for error in (*catalog.damaged.values(), *catalog.objects.damaged.values()):
        raise strip_frames(error)
    _ensure_store(backend, remote, counter)
    known = {checkpoint.id for checkpoint in catalog.checkpoints()}
    names = [ref_name(path) for path in list_refs(backend)]
    counter.timelines_left = count_skipped_timelines(names, timelines=timelines)
    sent = [name for name in names if is_transferred(name, timelines=timelines)]
    moves = _compare_refs(backend, remote, _read_refs(backend, sent, known), known, force=force)
    with remote.session("push"):
        _send_bases(backend, remote, counter)
        if with_base:
            for base in catalog.objects.bases().values():
                counter.base_bytes += push_base(remote, base, counter)
        _send_checkpoints(catalog, remote, counter)
    for ref in moves:
        _send_ref(backend, remote, ref, known, counter, force=force)


def _ensure_store(backend: Backend, remote: Remote, counter: TransferCounter) -> None:
    """Make an empty remote a store; raise an error if it holds other files."""
    target = RemoteBackend(remote)
    if not target.exists(CONFIG):
        others = [path for path in remote.sizes("") if not path.startswith(_IGNORED)]
        if others and not target.exists(CONFIG):
            raise NotAStoreError(
                f"{remote.describe('')} is not empty and no store ({others[0]}); choose a new place"
            )
        config = read_small_file(backend, CONFIG)
        if not others and remote.create(CONFIG, config):
            counter.add_file(len(config))
    read_level(target)


def _send_bases(backend: Backend, remote: Remote, counter: TransferCounter) -> None:
    existing = remote.sizes(BASES)
    target = RemoteBackend(remote)
    for identity in list_bases(backend):
        path = base_path(identity)
        record = read_small_file(backend, path)
        if existing.get(path) == len(record):
            continue
        if path in existing and is_sound(read_base, target, identity):
            continue
        parse_as(backend, path, record, read_base, identity)
        remote.put(path, *as_parts(record))
        counter.add_file(len(record), base=True)
    remote.sync(BASES)


def _send_checkpoints(catalog: Catalog, remote: Remote, counter: TransferCounter) -> None:
    backend = catalog.backend
    existing = remote.sizes(MANIFESTS)
    target = RemoteBackend(remote, nearby=backend)
    objects = read_objects(target)
    old: list[Checkpoint] = []
    new: list[Checkpoint] = []
    for checkpoint in catalog.checkpoints():
        path = manifest_path(checkpoint.id)
        same = existing.get(path) == backend.size(path)
        sound = same or (path in existing and is_sound(read_manifest, target, checkpoint.id))
        (old if sound else new).append(checkpoint)
    incomplete = is_missing_chunks(catalog.objects, objects, catalog.keys_by_base(old))
    keys = catalog.keys_by_base([*(old if incomplete else ()), *new])
    packs = select_packs(catalog.objects, backend, objects, keys)
    counter.unverified += verify_packs(catalog.objects, packs, counter, at_target=False)
    counter.start_step("send", sum(pack.size for pack in packs))
    map_parallel(partial(_send_pack, backend, remote, counter), packs, remote.workers)
    remote.sync(PACKS)
    map_parallel(partial(_send_manifest, backend, remote, counter), new, remote.workers)
    remote.sync(MANIFESTS)


def _send_pack(
    backend: Backend, remote: Remote, counter: TransferCounter, pack: PackTransfer
) -> None:
    remote.put(pack.path, counter.count_parts(lambda: pack.read_parts(backend)), pack.size)
    counter.add_file(pack.size, pack=True)


def _send_manifest(
    backend: Backend, remote: Remote, counter: TransferCounter, checkpoint: Checkpoint
) -> None:
    path = manifest_path(checkpoint.id)
    data = read_small_file(backend, path)
    parse_as(backend, path, data, read_manifest, checkpoint.id)
    remote.put(path, *as_parts(data))
    counter.add_file(len(data))
    counter.checkpoints.append(checkpoint.id)


def _read_refs(backend: Backend, names: Sequence[str], known: set[str]) -> list[Ref]:
    refs = [read_ref(backend, ref_path(name)) for name in names]
    for ref in refs:
        if ref.checkpoint not in known:
            raise CorruptedError(
                f"the ref {ref.name!r} points to a checkpoint that does not exist; {REPAIR_HINT}",
                file=backend.describe(ref_path(ref.name)),
            )
    return refs


def _compare_refs(
    backend: Backend, remote: Remote, refs: Sequence[Ref], known: set[str], *, force: bool
) -> list[Ref]:
    """Return the refs to be written; raise ConflictError before anything is sent."""
    listed = remote.sizes(REFS)

    def find(ref: Ref) -> tuple[Ref, Ref | None]:
        if ref_path(ref.name) not in listed:
            return ref, None
        return ref, _read_remote_ref(remote, ref.name, force=force)[0]

    pairs = map_parallel(find, refs, remote.workers)
    return [ref for ref, _ in _select_moves(backend, remote, pairs, known, force=force)]


def _select_moves(
    backend: Backend,
    remote: Remote,
    pairs: Sequence[tuple[Ref, Ref | None]],
    known: set[str],
    *,
    force: bool,
) -> list[tuple[Ref, Ref | None]]:
    return select_refs_to_move(
        pairs,
        known=known,
        force=force,
        source=backend.describe(""),
        target=remote.describe(""),
        hint="Another writer moved it there: pull first, or push --force to move it",
    )


def _read_remote_ref(remote: Remote, name: str, *, force: bool) -> tuple[Ref | None, object]:
    """Return a remote's ref and its version; with ``force``, no ref if it is damaged."""
    path = ref_path(name)
    found = remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
    if found is None:
        return None, None
    data, version = found
    try:
        return parse_as(RemoteBackend(remote), path, data, read_ref, path), version
    except CorruptedError:
        if force:
            return None, version
        raise


def _send_ref(
    backend: Backend,
    remote: Remote,
    ref: Ref,
    known: set[str],
    counter: TransferCounter,
    *,
    force: bool,
) -> None:
    path = ref_path(ref.name)
    data = read_small_file(backend, path)
    # If the ref was moved since it was listed, its checkpoint may not have been sent. The next
    # push sends both.
    if parse_as(backend, path, data, read_ref, path).checkpoint != ref.checkpoint:
        return
    for _ in range(_REF_ATTEMPTS):
        now, version = _read_remote_ref(remote, ref.name, force=force)
        if not _select_moves(backend, remote, [(ref, now)], known, force=force):
            return
        written = (
            remote.create(path, data) if version is None else remote.replace(path, data, version)
        )
        if written or _has_content(remote, path, data):
            counter.add_file(len(data))
            before = None if now is None else now.checkpoint
            counter.refs.append(RefMove(name=ref.name, before=before, after=ref.checkpoint))
            _log.info("moved ref %s at %s to %s", ref.name, remote.describe(""), ref.checkpoint)
            return
    raise ConflictError(
        f"other writers keep moving ref {ref.name!r} at {remote.describe('').rstrip('/')}; "
        "push again"
    )


def _has_content(remote: Remote, path: str, data: bytes) -> bool:
    """Return True if a file has these bytes: this process wrote them, but the reply was lost."""
    found = remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
    return found is not None and found[0] == data
