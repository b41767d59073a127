"""From a store's directory to a remote: what is missing there, in the order of the format.

Example::

    send(catalog, remote, tally, with_base=False, force=False, timelines=False)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from msft_store.errors import (
    REPAIR_HINT,
    ConflictError,
    CorruptedError,
    NotAStoreError,
    strip_frames,
)
from msft_store.objects.bases import BASES, base_path, list_bases, read_base
from msft_store.objects.catalog import CONFIG, Catalog, read_level
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    manifest_path,
    read_checkpoint,
    read_tensors,
)
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import REFS, Ref, list_refs, read_ref, ref_name, ref_path
from msft_store.pipeline.parallel import in_order
from msft_store.remote.backend import RemoteBackend
from msft_store.remote.bases import push_base
from msft_store.remote.missing_packs import Shipment, choose, lacks, objects_of, verify
from msft_store.remote.refs import RefMove, decide, left_behind, refusal, travels
from msft_store.remote.transfer import Tally
from msft_store.remote.transport.base import Remote, small
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES, TEMPORARY, Backend, read_small_file
from msft_store.storage.lock_files import LOCKS
from msft_store.storage.overlay import Overlay

_NOTHING = (f"{LOCKS}/", f"{TEMPORARY}/")
"""What may be there before there is a store."""
_TRIES = 5
"""How often a ref is compared and written, while others write it too."""
_T = TypeVar("_T")
_R = TypeVar("_R")


def send(
    catalog: Catalog,
    remote: Remote,
    tally: Tally,
    *,
    with_base: bool,
    force: bool,
    timelines: bool,
) -> None:
    """Send what a remote lacks of a store; see :func:`msft_store.remote.api.push`."""
    backend = catalog.backend
    catalog.refresh()
    for error in (*catalog.damaged.values(), *catalog.objects.damaged.values()):
        raise strip_frames(error)
    _claim(backend, remote, tally)
    known = {checkpoint.id for checkpoint in catalog.checkpoints()}
    refs = _refs(backend, known, timelines=timelines)
    tally.timelines_left = left_behind(map(ref_name, list_refs(backend)), timelines=timelines)
    refs = _to_move(backend, remote, refs, known, force=force)
    with remote.session("push"):
        _send_bases(backend, remote, tally)
        if with_base:
            for base in catalog.objects.bases().values():
                tally.base_bytes += push_base(remote, base, tally)
        _send_checkpoints(catalog, remote, tally)
    for ref in refs:
        _send_ref(backend, remote, ref, known, tally, force=force)


def _claim(backend: Backend, remote: Remote, tally: Tally) -> None:
    """Make the remote a store, if it is none and nothing else."""
    target = RemoteBackend(remote)
    if not target.exists(CONFIG):
        others = [path for path in remote.sizes("") if not path.startswith(_NOTHING)]
        if others and not target.exists(CONFIG):
            raise NotAStoreError(
                f"{remote.describe('')} is not empty and no store ({others[0]}); choose a new place"
            )
        config = read_small_file(backend, CONFIG)
        if not others and remote.create(CONFIG, config):
            tally.went(len(config))
    read_level(target)


def _send_bases(backend: Backend, remote: Remote, tally: Tally) -> None:
    there = remote.sizes(BASES)
    target = RemoteBackend(remote)
    for identity in list_bases(backend):
        path, record = base_path(identity), read_small_file(backend, base_path(identity))
        if path in there and (there[path] == len(record) or _reads(read_base, target, identity)):
            continue
        overlay = Overlay(backend)
        overlay.replaced[path] = record
        read_base(overlay, identity)
        remote.put(path, *small(record))
        tally.went(len(record), base=True)
    remote.settle(BASES)


def _send_checkpoints(catalog: Catalog, remote: Remote, tally: Tally) -> None:
    backend = catalog.backend
    there = remote.sizes(MANIFESTS)
    target = RemoteBackend(remote, nearby=backend)
    objects = objects_of(target)
    old: list[Checkpoint] = []
    new: list[Checkpoint] = []
    for checkpoint in catalog.checkpoints():
        path = manifest_path(checkpoint.id)
        same = there.get(path) == backend.size(path)
        sound = same or (path in there and _reads(_read_manifest, target, checkpoint.id))
        (old if sound else new).append(checkpoint)
    mended = old if lacks(catalog.objects, objects, catalog.keys_by_base(old)) else []
    keys = catalog.keys_by_base([*mended, *new])
    shipments = choose(catalog.objects, backend, objects, keys)
    tally.unverified += verify(catalog.objects, shipments, tally, come=False)
    tally.begin("send", sum(shipment.size for shipment in shipments))
    _each(remote, partial(_send_pack, backend, remote, tally), shipments)
    remote.settle(PACKS)
    _each(remote, partial(_send_manifest, backend, remote, tally), new)
    remote.settle(MANIFESTS)


def _send_pack(backend: Backend, remote: Remote, tally: Tally, shipment: Shipment) -> None:
    remote.put(shipment.path, tally.counted(lambda: shipment.parts(backend)), shipment.size)
    tally.went(shipment.size, pack=True)


def _send_manifest(backend: Backend, remote: Remote, tally: Tally, checkpoint: Checkpoint) -> None:
    path = manifest_path(checkpoint.id)
    data = read_small_file(backend, path)
    overlay = Overlay(backend)
    overlay.replaced[path] = data
    _read_manifest(overlay, checkpoint.id)
    remote.put(path, *small(data))
    tally.went(len(data))
    tally.checkpoints.append(checkpoint.id)


def _each(remote: Remote, act: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """Return what comes of each item, as many at once as the remote takes."""
    if remote.workers == 1:
        return [act(item) for item in items]
    with contextlib.closing(in_order(act, iter(items), remote.workers)) as done:
        return list(done)


def _read_manifest(backend: Backend, identity: str) -> None:
    read_tensors(backend, read_checkpoint(backend, identity))


def _reads(read: Callable[[Backend, str], object], backend: Backend, identity: str) -> bool:
    """Return whether what is there is sound."""
    try:
        read(backend, identity)
    except CorruptedError:
        return False
    return True


def _refs(backend: Backend, known: set[str], *, timelines: bool) -> list[Ref]:
    found = []
    for path in list_refs(backend):
        if travels(ref_name(path), timelines=timelines):
            ref = read_ref(backend, path)
            if ref.checkpoint not in known:
                raise CorruptedError(
                    f"the ref {ref.name!r} points to a checkpoint that is not there; {REPAIR_HINT}",
                    file=backend.describe(path),
                )
            found.append(ref)
    return found


def _to_move(
    backend: Backend, remote: Remote, refs: Sequence[Ref], known: set[str], *, force: bool
) -> list[Ref]:
    """Return the refs that are not as they are here; refuse at once what would be in the end."""
    here, there = backend.describe("").rstrip("/"), remote.describe("").rstrip("/")
    listed = remote.sizes(REFS)

    def look(ref: Ref) -> tuple[Ref, Ref | None]:
        if ref_path(ref.name) not in listed:
            return ref, None
        return ref, _ref_there(backend, remote, ref.name, force=force)[0]

    moves, reasons = [], []
    for ref, now in _each(remote, look, refs):
        decision = decide(ref, now, known=known, force=force)
        if decision == "refuse" and now is not None:
            reasons.append(refusal(ref, now, here=here, there=there))
        elif decision != "same":
            moves.append(ref)
    if reasons:
        raise _conflict(reasons)
    return moves


def _conflict(reasons: list[str]) -> ConflictError:
    return ConflictError(
        f"{'; '.join(reasons)}. Somebody moved it there: pull first, or push --force to move it"
    )


def _ref_there(
    backend: Backend, remote: Remote, name: str, *, force: bool
) -> tuple[Ref | None, object]:
    """Return a remote's ref and its version; with ``force``, none for one that is damaged."""
    path = ref_path(name)
    found = remote.whole(path, MAX_SMALL_FILE_BYTES)
    if found is None:
        return None, None
    data, version = found
    overlay = Overlay(RemoteBackend(remote))
    overlay.replaced[path] = data
    try:
        return read_ref(overlay, path), version
    except CorruptedError:
        if force:
            return None, version
        raise


def _send_ref(
    backend: Backend, remote: Remote, ref: Ref, known: set[str], tally: Tally, *, force: bool
) -> None:
    path = ref_path(ref.name)
    data = read_small_file(backend, path)
    overlay = Overlay(backend)
    overlay.replaced[path] = data
    # One that was moved here since may point to what was not sent; it goes with the next push.
    if read_ref(overlay, path).checkpoint != ref.checkpoint:
        return
    here, there = backend.describe("").rstrip("/"), remote.describe("").rstrip("/")
    for _ in range(_TRIES):
        now, version = _ref_there(backend, remote, ref.name, force=force)
        decision = decide(ref, now, known=known, force=force)
        if decision == "same":
            return
        if decision == "refuse" and now is not None:
            raise _conflict([refusal(ref, now, here=here, there=there)])
        written = (
            remote.create(path, data) if version is None else remote.replace(path, data, version)
        )
        if written or _is_now(remote, path, data):
            tally.went(len(data))
            before = None if now is None else now.checkpoint
            tally.refs.append(RefMove(name=ref.name, before=before, after=ref.checkpoint))
            return
    raise ConflictError(f"others keep moving ref {ref.name!r} at {there}; push again")


def _is_now(remote: Remote, path: str, data: bytes) -> bool:
    """Return whether a file has these bytes: where a reply was lost, they may be ours."""
    found = remote.whole(path, MAX_SMALL_FILE_BYTES)
    return found is not None and found[0] == data
