"""The cached contents of a store directory: checkpoints, refs, bases and chunks.

The groups above (gc, check, export and the store itself) share one catalog. It caches immutable
files and rereads everything else on :meth:`Catalog.refresh`.

Reading takes no lock, so that a listed file may be deleted before it is read. This is not damage:
:func:`read_consistently` repeats an operation that failed while files appeared or disappeared, at
last while it holds the lock.

Example::

    catalog = Catalog(LocalBackend(path))
    catalog.refresh()
    plan = read_consistently(backend, lambda: plan_gc(catalog))
"""

from __future__ import annotations

import contextlib
import difflib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from msft_store.errors import (
    REPAIR_HINT,
    BusyError,
    CorruptedError,
    InvalidInputError,
    NotAStoreError,
    StorageError,
    StoreError,
    UnknownCheckpointError,
    VersionError,
    strip_frames,
    strip_hint,
)
from msft_store.format.key_table import (
    Keys,
    Numbers,
    concatenate_keys,
    select_changed_keys,
    unique_keys,
)
from msft_store.format.layout import CHUNK_BYTES, NEWEST, VERSIONS, seal, unseal
from msft_store.objects.bases import Base
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import (
    MANIFESTS,
    Checkpoint,
    TensorEntry,
    list_manifests,
    manifest_path,
    read_checkpoint,
)
from msft_store.objects.packs import PACKS, list_packs
from msft_store.objects.refs import REFS, Ref, RefReader, delete_ref, has_ended, ref_path
from msft_store.objects.tables import TensorTables
from msft_store.storage.backend import (
    TEMPORARY,
    Backend,
    LocalBackend,
    read_small_file,
    translate_os_errors,
    write_atomic,
)

_T = TypeVar("_T")


def read_consistently(
    backend: Backend,
    read: Callable[[], _T],
    is_valid: Callable[[_T], bool] = lambda _: True,
    *,
    times: int = 1,
) -> _T:
    """Run a read operation, again if other processes changed the store while it failed.

    It runs at most ``times`` times without the lock and then once with it. A result for which
    ``is_valid`` returns False counts as a failure.
    """
    for _ in range(times):
        before = _names(backend)
        try:
            found = read()
            if is_valid(found) or _names(backend) == before:
                return found
        except StoreError:
            if _names(backend) == before:
                raise
    with contextlib.ExitStack() as stack:
        # A read-only store has no lock, but can still be read.
        with contextlib.suppress(BusyError, StorageError):
            stack.enter_context(backend.lock(shared=True, purpose="read"))
        return read()


def _names(backend: Backend) -> set[str]:
    return {path for folder in (MANIFESTS, PACKS, REFS) for path in backend.list(folder)}


CONFIG = "store.json"
_SHORTEST_PREFIX = 4
_REPAIR_ALONE = "msft-store repair rewrites it (--dry-run shows what it would do)"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The content of ``store.json``."""

    version: int = NEWEST
    """The latest version of the files that the store's writers write."""


def encode_config(config: Config) -> bytes:
    """Return the bytes of ``store.json``; :class:`InvalidInputError` for an unknown value."""
    if config.version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise InvalidInputError(f"version is one of {known}, not {config.version!r}")
    fields = {"format": "msft-store", "version": config.version, "chunk_bytes": CHUNK_BYTES}
    return seal(fields)


def create_store(root: Path, version: int = NEWEST) -> LocalBackend:
    """Make a new or empty directory a store of a version of the byte format.

    :class:`NotAStoreError` if it holds a store or other files, :class:`InvalidInputError` if there
    is no such version or the directory is inside a store.
    """
    config = encode_config(Config(version=version))
    refuse_inside_store(root, "choose")
    backend = LocalBackend(root)
    if backend.exists(CONFIG):
        raise NotAStoreError(
            f"there is a store at {root} already: open that one, or choose another path"
        )
    with translate_os_errors("read", root):
        # A killed process or a full disk may have left the folder of temporary files behind.
        if root.exists() and (not root.is_dir() or {p.name for p in root.iterdir()} - {TEMPORARY}):
            raise NotAStoreError(f"{root} is not empty and not a store; choose a new directory")
    backend.make_root()
    write_atomic(backend, CONFIG, config)
    return backend


def refuse_inside_store(folder: Path, action: str, *, itself: bool = False) -> None:
    """Raise :class:`InvalidInputError` if a folder is inside of a store, also through links.

    ``itself`` refuses the directory of a store, too. ``action`` is a verb for the message.
    """
    real = Path(os.path.realpath(folder))
    with translate_os_errors("read", folder):
        for place in (real, *real.parents) if itself else real.parents:
            if (place / CONFIG).is_file():
                raise InvalidInputError(
                    f"{folder} is inside the store {place}; {action} a directory outside of it"
                )


def read_config(backend: Backend) -> Config:
    """Return the content of ``store.json``."""
    what = backend.describe(CONFIG)
    try:
        config = unseal(read_small_file(backend, CONFIG), what, "msft-store", VERSIONS)
    except CorruptedError as error:
        # Only repair can open such a store, so do not recommend check.
        raise CorruptedError(f"{strip_hint(error)}; {_REPAIR_ALONE}", file=what) from None
    if config.get("chunk_bytes") != CHUNK_BYTES:
        raise VersionError(f"{what} states another chunk_bytes than {CHUNK_BYTES}")
    return Config(version=config["version"])


def _hint(backend: Backend) -> str:
    """Return advice for a directory without ``store.json``."""
    with contextlib.suppress(StorageError):  # The path can be a file, or be unreadable.
        if list_manifests(backend) or list_packs(backend):
            return f"its {CONFIG} is missing, but it holds checkpoints: {_REPAIR_ALONE}"
    inside = backend.exists(f"store/{CONFIG}")
    if inside:
        return f"there is one in {backend.describe('store')}: give that path"
    return "check the path, or create a store there with: msft-store init"


class Catalog:
    """The contents of one store directory."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.objects = ChunkStore(backend)
        self._refs = RefReader(backend)
        self._checkpoints: dict[str, Checkpoint] = {}
        self._damaged: dict[str, StoreError] = {}
        self._keys: dict[str, Keys] = {}
        self.tables = TensorTables(backend, lambda identity: self.objects.base(identity).base)
        """The tensor tables of the checkpoints."""
        if not backend.exists(CONFIG):
            raise NotAStoreError(f"no store at {backend.describe('')}; {_hint(backend)}")
        self.config = read_config(backend)

    def refresh(self) -> None:
        """Reread the directory to see the changes of other processes."""
        if self.config.version != NEWEST:
            # Another process may have upgraded the store.
            self.config = read_config(self.backend)
        identities = set(list_manifests(self.backend))
        # Copy the dictionary, because other threads may add to it at the same time.
        known, damaged = dict(self._checkpoints), {}
        checkpoints = {identity: known[identity] for identity in known if identity in identities}
        for identity in sorted(identities - checkpoints.keys()):
            try:
                checkpoints[identity] = read_checkpoint(self.backend, identity)
            except StoreError as error:
                # A manifest that was deleted after the listing is not damaged.
                if self.backend.exists(manifest_path(identity)):
                    damaged[identity] = strip_frames(error)
        self._checkpoints, self._damaged = checkpoints, damaged
        keys = dict(self._keys)
        self._keys = {identity: keys[identity] for identity in keys if identity in checkpoints}
        self.objects.refresh()

    @property
    def damaged(self) -> dict[str, StoreError]:
        """Errors of unreadable manifests, by id; :meth:`checkpoints` leaves these out."""
        return self._damaged

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first."""
        return sorted(self._checkpoints.values(), key=lambda ckpt: (ckpt.created, ckpt.id))

    def get(self, identity: str) -> Checkpoint | None:
        """Return the checkpoint with exactly this id."""
        return self._checkpoints.get(identity)

    def find_intact(self, identity: str) -> Checkpoint | None:
        """Return the checkpoint with exactly this id, if its manifest on disk is undamaged."""
        found = self.get(identity)
        try:
            if found is not None:
                read_checkpoint(self.backend, identity)
                self.tensors(found)
        except CorruptedError:
            return None
        return found

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint whose manifest was just written."""
        self._checkpoints[checkpoint.id] = checkpoint

    def remove(self, identity: str) -> None:
        """Remove a checkpoint whose manifest was deleted."""
        self._checkpoints.pop(identity, None)

    def resolve(self, name: str | Checkpoint) -> Checkpoint:
        """Return a checkpoint by id, unique prefix of an id, or name of a ref.

        The message of :class:`UnknownCheckpointError` suggests the closest name.
        """
        if isinstance(name, Checkpoint):
            name = name.id
        if not isinstance(name, str):
            raise InvalidInputError(f"a checkpoint, an id or the name of a ref, not {name!r}")
        found = self._checkpoints.get(name)
        if found is not None:
            return found
        # An unreadable ref must not prevent looking up other names.
        refs, unreadable = self._refs.scan()
        if ref_path(name) in unreadable:
            raise unreadable[ref_path(name)]
        identity = refs[name].checkpoint if name in refs else name
        target = self._checkpoints.get(identity)
        if target is not None:
            return target
        if identity in self._damaged:
            raise self._damaged[identity]
        if name in refs:
            raise CorruptedError(
                f"the ref {name!r} points to a checkpoint that does not exist; {REPAIR_HINT}"
            )
        matches = [c for c in self.checkpoints() if c.id.startswith(name)]
        if len(matches) == 1 and len(name) >= _SHORTEST_PREFIX:
            return matches[0]
        if len(matches) > 1 and name:
            raise UnknownCheckpointError(
                f"{name!r} begins the ids of {len(matches)} checkpoints; give more characters"
            )
        # Search the ids of bases too, because some commands also accept a base.
        known = [*self._checkpoints, *self.objects.bases()]
        if 0 < len(name) < _SHORTEST_PREFIX and any(one.startswith(name) for one in known):
            raise UnknownCheckpointError(
                f"{name!r} is too short, as later ids may begin with it too; give at least "
                f"{_SHORTEST_PREFIX} characters"
            )
        for identity, damage in self._damaged.items():
            if identity.startswith(name) and len(name) >= _SHORTEST_PREFIX:
                raise damage
        raise UnknownCheckpointError(self._no_such(name, refs))

    def check_not_an_id(self, name: str, checkpoint: str) -> None:
        """Raise :class:`InvalidInputError` if an id other than the checkpoint's begins so."""
        if len(name) < _SHORTEST_PREFIX:
            return
        for identity in {*self._checkpoints, *self._damaged, *self.objects.bases()}:
            if identity.startswith(name) and identity != checkpoint:
                raise InvalidInputError(
                    f"the id {identity[:12]} begins with {name!r}, so a ref of this name would "
                    "hide it, or be hidden; choose another name"
                )

    def resolve_base(self, name: str | Base) -> Base | None:
        """Return a base by id or unique prefix; ``None`` if there is none."""
        if isinstance(name, Base):
            name = name.id
        if not isinstance(name, str):
            raise InvalidInputError(f"a base or the id of one, not {name!r}")
        bases = self.objects.bases()
        matches = [base for base in bases.values() if base.id.startswith(name)]
        exact = bases.get(name)
        if exact is not None or len(matches) != 1 or len(name) < _SHORTEST_PREFIX:
            return exact
        return matches[0]

    def resolve_parent(
        self, parent: Base | Checkpoint | str | None
    ) -> tuple[str | None, str | None, Checkpoint | None]:
        """Return a parent's id, its base's id, and the parent if it is a checkpoint."""
        if parent is None:
            return None, None, None
        base = None if isinstance(parent, Checkpoint) else self.resolve_base(parent)
        if base is not None:
            return base.id, base.id, None
        if isinstance(parent, Base):
            raise UnknownCheckpointError(
                f"base {parent.id[:12]} is not one of {self.backend.describe('')}; "
                "add it with add_base"
            )
        if not isinstance(parent, Checkpoint | str):
            raise InvalidInputError(f"a parent is a base or a checkpoint, not {parent!r}")
        found = self.resolve(parent)
        return found.id, found.base, found

    def tensors(self, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
        """Return a checkpoint's tensor table."""
        self.require_exists(checkpoint)
        try:
            return self.tables.read(checkpoint)
        except StorageError:
            # Report a checkpoint that another process forgot meanwhile as unknown.
            self.require_exists(checkpoint)
            raise

    def keys(self, checkpoint: Checkpoint) -> Keys:
        """Return the keys of all chunks that a checkpoint names, with duplicates."""
        found = self._keys.get(checkpoint.id)
        if found is None:
            try:
                found = self.tables.keys(checkpoint)
            except StorageError:
                self.require_exists(checkpoint)
                raise
            self._keys[checkpoint.id] = found
        return found

    def keys_by_base(self, checkpoints: Iterable[Checkpoint]) -> dict[str | None, Keys]:
        """Return the keys of all chunks that checkpoints name, by the checkpoints' base."""
        parts: dict[str | None, list[Keys]] = {}
        before: dict[str | None, Keys] = {}
        for checkpoint in checkpoints:
            keys, base = self.keys(checkpoint), checkpoint.base
            # Skip keys at the same position as in the previous checkpoint: most are equal.
            parts.setdefault(base, []).append(select_changed_keys(keys, before.get(base)))
            before[base] = keys
        return {base: concatenate_keys(keys) for base, keys in parts.items()}

    def stored_bytes(self, checkpoint: Checkpoint) -> int:
        """Return the current encoded bytes of the chunks that a checkpoint names."""
        return int(self.objects.index.lengths[self._rows(checkpoint)].sum())

    def depth(self, checkpoint: Checkpoint) -> int:
        """Return the depth that at least half of a checkpoint's encoded bytes do not exceed."""
        index, rows = self.objects.index, self._rows(checkpoint)
        if not rows.size:
            return 0
        order = rows[np.argsort(index.depths[rows], kind="stable")]
        bytes_up_to = np.cumsum(index.lengths[order], dtype=np.int64)
        return int(index.depths[order[np.searchsorted(bytes_up_to, bytes_up_to[-1] / 2)]])

    def _rows(self, checkpoint: Checkpoint) -> Numbers:
        """Return the rows of the index that hold the chunks that a checkpoint names."""
        keys = unique_keys(self.keys(checkpoint))
        return self.objects.find_needed(self.objects.index, keys, checkpoint.base)[0]

    def lineage(self, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
        """Yield a checkpoint, its parent and so on, as far as they are there."""
        found: Checkpoint | None = checkpoint
        while found is not None:
            yield found
            found = self._checkpoints.get(found.parent or "")

    def refs(self) -> dict[str, Ref]:
        """Return all refs by name."""
        return self._refs.read()

    def list_protected(self) -> dict[str, str]:
        """Return the reasons why refs protect checkpoints, by checkpoint id.

        A lease that has ended protects nothing.
        """
        reasons: dict[str, list[str]] = {}
        now = time.time_ns()
        for name, ref in sorted(self.refs().items()):
            if has_ended(ref, now):
                continue
            notes = ref.note.get("reasons")
            listed = notes if isinstance(notes, list) else []
            texts = dict.fromkeys(" ".join(str(reason).split()) for reason in listed)
            why = f" ({', '.join(texts)})" if texts else ""
            reasons.setdefault(ref.checkpoint, []).append(f"pinned as {name}{why}")
        return {identity: "; ".join(pins) for identity, pins in reasons.items()}

    def delete_leases_of(self, identities: Collection[str]) -> None:
        """Delete the refs to checkpoints that no ref protects: leases that have ended."""
        for ref in self.refs().values():
            if ref.checkpoint in identities:
                delete_ref(self.backend, ref.name)

    def require_exists(self, checkpoint: Checkpoint) -> None:
        """Raise :class:`UnknownCheckpointError` if a checkpoint was forgotten."""
        if not self.backend.exists(manifest_path(checkpoint.id)):
            self.remove(checkpoint.id)
            raise UnknownCheckpointError(
                f"checkpoint {checkpoint.id} is no longer in {self.backend.describe('')}: "
                "it was forgotten"
            )

    def _no_such(self, name: str, refs: dict[str, Ref]) -> str:
        where = self.backend.describe("")
        if not self._checkpoints:
            return f"no checkpoint {name!r} in {where}: it holds none yet"
        near = difflib.get_close_matches(name, [*self._checkpoints, *refs], n=1, cutoff=0.0)
        ckpt = self._checkpoints.get(near[0]) if near else None
        step = f" (step {ckpt.step})" if ckpt is not None and ckpt.step is not None else ""
        hint = f"; the nearest is {near[0]}{step}" if near else ""
        return f"no checkpoint {name!r} in {where}{hint}"
