"""Send the files that a remote is missing, in the order that the format requires.

Example::

    push_store(catalog, remote, counter, with_base=False, force=False, timelines=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msft_store.errors import (
    REPAIR_HINT,
    ConflictError,
    CorruptedError,
    InvalidInputError,
    NotAStoreError,
    strip_frames,
)
from msft_store.objects.bases import BASES, base_path, list_bases, read_base
from msft_store.objects.catalog import CONFIG, Catalog, read_config, refuse_inside_store
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import MANIFESTS, Checkpoint, manifest_path
from msft_store.objects.packs import PACKS
from msft_store.objects.refs import REFS, Ref, list_refs, parse_ref, read_ref, ref_path
from msft_store.remote.backend import (
    RemoteBackend,
    is_sound,
    map_parallel,
    require_version,
)
from msft_store.remote.bases import has_base, push_base
from msft_store.remote.missing_packs import (
    PackTransfer,
    is_missing_chunks,
    select_packs,
    verify_packs,
)
from msft_store.remote.refs import RefPair, RefRule, split_names
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import Remote, as_parts
from msft_store.storage.backend import (
    MAX_SMALL_FILE_BYTES,
    TEMPORARY,
    LocalBackend,
    read_small_file,
)
from msft_store.storage.lock_files import LOCKS
from msft_store.storage.overlay import Overlay

_IGNORED = (f"{LOCKS}/", f"{TEMPORARY}/")
"""Folders that may exist in a place that is not a store yet."""
_REF_ATTEMPTS = 5
"""Number of attempts to write a ref that other processes write at the same time."""


def refuse_itself(target: object, store: Path) -> None:
    """Raise :class:`InvalidInputError` if a target is the store in a directory, or inside one."""
    if isinstance(target, LocalBackend):
        refuse_inside_store(target.root, "push to")
        if target.root.exists() and target.root.samefile(store):
            raise InvalidInputError(f"{target.root} is the store itself; push to another directory")


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
    catalog.refresh()
    for error in (*catalog.damaged.values(), *catalog.objects.damaged.values()):
        raise strip_frames(error)
    rule = RefRule(
        known={checkpoint.id for checkpoint in catalog.checkpoints()},
        force=force,
        source=catalog.backend.describe(""),
        target=remote.describe(""),
        advice="Another writer moved it there: pull first, or push --force to move it",
    )
    push = Push(catalog, remote, counter, rule)
    push.ensure_store()
    names, left = split_names(list_refs(catalog.backend), timelines=timelines)
    counter.set_left(timelines_left=left)
    refs = push.select_refs(names)
    with remote.session("push"):
        push.send_bases()
        if with_base:
            for base in catalog.objects.bases().values():
                counter.add(base_bytes=push_base(remote, base, counter))
        push.send_checkpoints(catalog.checkpoints())
        counter.set_left(bases_left=push.find_bases_left())
    for ref in refs:
        push.send_ref(ref)


@dataclass(frozen=True)
class Push:
    """One push of a store to a remote."""

    catalog: Catalog
    remote: Remote
    counter: TransferCounter
    rule: RefRule

    def ensure_store(self) -> None:
        """Make an empty remote a store; raise an error if it holds other files."""
        remote, target = self.remote, RemoteBackend(self.remote)
        if not target.exists(CONFIG):
            others = [path for path in remote.sizes("") if not path.startswith(_IGNORED)]
            if others and not target.exists(CONFIG):
                raise NotAStoreError(
                    f"{remote.describe('')} is not empty and no store ({others[0]}); choose a new "
                    "place"
                )
            config = read_small_file(self.catalog.backend, CONFIG)
            if not others and remote.create(CONFIG, config):
                self.counter.add(bytes=len(config))
        require_version(self.catalog.config, self.catalog.backend, read_config(target), target)

    def send_bases(self) -> None:
        backend, target = self.catalog.backend, RemoteBackend(self.remote)
        existing = self.remote.sizes(BASES)
        for identity in list_bases(backend):
            path = base_path(identity)
            record = read_small_file(backend, path)
            if existing.get(path) == len(record):
                continue
            if path in existing and is_sound(read_base, target, identity):
                continue
            read_base(Overlay(backend, {path: record}), identity)
            self.remote.put(path, *as_parts(record))
            self.counter.add(bytes=len(record), bases=1)
        self.remote.sync(BASES)

    def send_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Send the manifests that the remote is missing, and before them the packs they need."""
        catalog, remote, counter = self.catalog, self.remote, self.counter
        existing = remote.sizes(MANIFESTS)
        target = RemoteBackend(remote, nearby=catalog.backend)
        objects = ChunkStore(target)
        old: list[Checkpoint] = []
        new: list[Checkpoint] = []
        for checkpoint in checkpoints:
            path = manifest_path(checkpoint.id)
            same = existing.get(path) == catalog.backend.size(path)
            sound = same or (
                path in existing and is_sound(catalog.tables.verify, target, checkpoint.id)
            )
            (old if sound else new).append(checkpoint)
        incomplete = is_missing_chunks(catalog.objects, objects, catalog.keys_by_base(old))
        keys = catalog.keys_by_base([*(old if incomplete else ()), *new])
        packs = select_packs(catalog.objects, catalog.backend, objects, keys)
        unverified = verify_packs(catalog.objects, packs, counter, at_target=False)
        counter.add(unverified=unverified)
        counter.start_step("send", sum(pack.size for pack in packs))
        map_parallel(self._send_pack, packs, remote.workers)
        remote.sync(PACKS)
        map_parallel(self._send_manifest, new, remote.workers)
        remote.sync(MANIFESTS)

    def find_bases_left(self) -> tuple[str, ...]:
        """Return the paths of the bases that sent checkpoints need and the remote does not have."""
        sent = [self.catalog.get(identity) for identity in self.counter.done.checkpoints]
        known = self.catalog.objects.bases()
        needed = {c.base for c in sent if c is not None and c.base is not None}
        return tuple(known[i].path for i in sorted(needed) if not has_base(self.remote, i))

    def _send_pack(self, pack: PackTransfer) -> None:
        parts = self.counter.count_parts(lambda: pack.read_parts(self.catalog.backend))
        self.remote.put(pack.path, parts, pack.size)
        self.counter.add(bytes=pack.size, packs=1)

    def _send_manifest(self, checkpoint: Checkpoint) -> None:
        backend, path = self.catalog.backend, manifest_path(checkpoint.id)
        data = read_small_file(backend, path)
        self.catalog.tables.verify(Overlay(backend, {path: data}), checkpoint.id)
        self.remote.put(path, *as_parts(data))
        self.counter.add(bytes=len(data), checkpoints=(checkpoint.id,))

    def select_refs(self, names: list[str]) -> list[Ref]:
        """Return the refs to be written; raise ConflictError before anything is sent."""
        backend = self.catalog.backend
        refs = [read_ref(backend, ref_path(name)) for name in names]
        for ref in refs:
            if ref.checkpoint not in self.rule.known:
                raise CorruptedError(
                    f"the ref {ref.name!r} points to a checkpoint that does not exist; "
                    f"{REPAIR_HINT}",
                    file=backend.describe(ref_path(ref.name)),
                )
        listed = self.remote.sizes(REFS)

        def pair(ref: Ref) -> RefPair:
            exists = ref_path(ref.name) in listed
            return ref, self._read_remote_ref(ref.name)[0] if exists else None

        pairs = map_parallel(pair, refs, self.remote.workers)
        return [ref for ref, _ in self.rule.select(pairs)]

    def _read_remote_ref(self, name: str) -> tuple[Ref | None, object]:
        """Return a remote's ref and its version; no ref if it is damaged and force is set."""
        path = ref_path(name)
        found = self.remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
        if found is None:
            return None, None
        data, version = found
        try:
            return parse_ref(data, path, self.remote.describe(path)), version
        except CorruptedError:
            if self.rule.force:
                return None, version
            raise

    def send_ref(self, ref: Ref) -> None:
        backend, remote, path = self.catalog.backend, self.remote, ref_path(ref.name)
        data = read_small_file(backend, path)
        # If the ref was moved since it was listed, its checkpoint may not have been sent. The next
        # push sends both.
        if parse_ref(data, path, backend.describe(path)).checkpoint != ref.checkpoint:
            return
        for _ in range(_REF_ATTEMPTS):
            now, version = self._read_remote_ref(ref.name)
            if not self.rule.select([(ref, now)]):
                return
            written = (
                remote.create(path, data)
                if version is None
                else remote.replace(path, data, version)
            )
            if written or self._has_content(path, data):
                self.counter.add_ref(now, ref, len(data), remote.describe(""))
                return
        raise ConflictError(
            f"other writers keep moving ref {ref.name!r} at {remote.describe('').rstrip('/')}; "
            "push again"
        )

    def _has_content(self, path: str, data: bytes) -> bool:
        """Return True if a file has these bytes: the write succeeded, but its reply was lost."""
        found = self.remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
        return found is not None and found[0] == data
