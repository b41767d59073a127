"""Push a store to an object store, or pull or clone it from there.

A remote has the same files as a store's directory, under a URL: ``s3://bucket/run``, ``gs://…``,
``az://…``, ``file:///…`` or any other scheme of fsspec (``pip install 'msft-store[remote]'``). Only
missing files are transferred, and their chunks are compared with their keys. If a transfer is
interrupted, the same command resumes it: complete files are not transferred again.

Invariants (FORMAT.md, section 9):

- Files are written in the order ``store.json``, bases, packs, manifests, refs, so that a concurrent
  reader sees complete checkpoints only. Existing sound files are not replaced, and no file of a
  remote is ever deleted.
- Refs follow the source by conditional writes. A target's ref that points to a checkpoint which the
  source does not have was moved by another writer: :class:`ConflictError` is raised before anything
  is transferred, unless ``force`` is set. Refs that were removed in the source stay in the target.
- Refs of timelines belong to one running process. They are transferred only with
  ``timelines=True``, which moves a run to another machine.
- The files of base models are transferred only with ``with_base=True``. Otherwise tell the clone
  where the model is, with :meth:`Store.relocate`. Until then, chunks that are differences to the
  base cannot be verified (``Transfer.unverified``); every ``load`` and ``check`` verifies them.

Example::

    from msft_store.integrations.remote import clone, pull, push

    push("run/store", "s3://bucket/run", with_base=True)
    clone("s3://bucket/run", "elsewhere/store", with_base=True)
    pull("elsewhere/store", "s3://bucket/run")           # later: new checkpoints only
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from msft_store._util import PathLike, check_path
from msft_store.errors import BaseError, ConflictError, NotAStoreError
from msft_store.format.layout import NEWEST
from msft_store.maintenance.gc import evict
from msft_store.objects.bases import base_path, encode_base, list_bases, scan_base
from msft_store.objects.catalog import (
    CONFIG,
    Catalog,
    create_store,
    encode_config,
    read_config,
    read_consistently,
    refuse_inside_store,
)
from msft_store.remote.backend import RemoteBackend, require_store
from msft_store.remote.missing_packs import UnsoundTargetError
from msft_store.remote.pull import pull_store
from msft_store.remote.push import push_store, refuse_itself
from msft_store.remote.transfer import Progress, Transfer, TransferCounter
from msft_store.remote.transport.url import connect_remote
from msft_store.storage.backend import (
    MAX_SMALL_FILE_BYTES,
    TEMPORARY,
    Backend,
    LocalBackend,
    write_atomic,
)
from msft_store.storage.overlay import Overlay
from msft_store.storage.quota import QuotaBackend

_log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""Number of times that a push starts again because a gc deleted a file that it was to send."""
_CLONING = f"{TEMPORARY}/cloning"
"""Marks a clone that is not complete, and holds the address that it is made from."""


@runtime_checkable
class OpenStore(Protocol):
    """A :class:`~msft_store.Store`, of which a transfer uses the directory."""

    @property
    def path(self) -> str:
        """Path of the store's directory."""


def push(
    store: OpenStore | PathLike,
    url: Any,
    *,
    with_base: bool = False,
    force: bool = False,
    timelines: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Transfer:
    """Send the checkpoints, bases and refs of a store that a remote is missing.

    An empty remote becomes a store. Checkpoints may be saved and evicted meanwhile.

    Args:
        store: The store or its directory.
        url: A URL, a path, an obstore store or a :class:`~msft_store.remote.transport.base.Remote`.
        with_base: Also send the files of base models.
        force: Also move refs that another writer moved on the remote.
        timelines: Also send the refs of timelines, to move a run to another machine.
        progress: Called with a step (``"send"``), its bytes so far and its total bytes (0 if
            unknown). Calls come from several threads, but only one at a time.
        **options: Passed on to ``obstore.store.from_url`` or to the fsspec file system.

    Returns:
        The checkpoints, packs, bases and refs that were transferred.

    Raises:
        ConflictError: If another writer moved a ref. Nothing is sent if that was so at the start.
        CorruptedError: If a file of the store or the remote is damaged.
        InvalidInputError: If the remote is a directory inside a store, or the store itself.
        NotAStoreError: If the remote holds other files, or ``store`` is not a store.
        BaseError: If a base model that is to be sent is missing or changed.
        StorageError: If the remote cannot be reached or refuses a request.
    """
    backend, remote = LocalBackend(_directory(store)), connect_remote(url, **options)
    counter = TransferCounter(progress)
    target = getattr(remote, "backend", None)
    refuse_itself(target, backend.root)

    def push_once() -> None:
        catalog = Catalog(backend)
        push_store(catalog, remote, counter, with_base=with_base, force=force, timelines=timelines)

    retry_after_gc(
        lambda: read_consistently(backend, push_once, times=_ATTEMPTS),
        target,
    )
    return counter.done


def pull(
    store: OpenStore | PathLike,
    url: Any,
    *,
    with_base: bool = False,
    base_directory: PathLike | None = None,
    force: bool = False,
    timelines: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Transfer:
    """Fetch the checkpoints, bases and refs of a remote that a store is missing.

    Everything is verified before it is moved to its place in the store. A gc waits meanwhile. The
    other arguments and the result are as in :func:`push`.

    Args:
        with_base: Also fetch the files of base models that are not where the store expects them.
        base_directory: The directory for these files; a base goes to ``base_directory/<base id>``.
            The default is ``<store>-bases``, beside the store.
        force: Also move refs that were moved in this store.
        timelines: Also fetch the refs of timelines, to move a run to this machine.
        progress: As in :func:`push`; the step is ``"fetch"`` or ``"verify"``.

    Raises:
        ConflictError: If a ref was moved in this store.
        CorruptedError: If a file of the store or the remote is damaged.
        NotAStoreError: If there is no store at the URL or in ``store``.
        BaseError: If the remote does not have the files of a base.
        StorageError: If the remote cannot be reached, or the disk is full.
    """
    root, remote = _directory(store), connect_remote(url, **options)
    backend = QuotaBackend(LocalBackend(root))
    bases = None
    if with_base:
        default = root.parent / f"{root.name}-bases"
        bases = default if base_directory is None else check_path(base_directory)
        refuse_inside_store(bases, "fetch base models to", itself=True)
    counter = TransferCounter(progress)

    def pull_once() -> None:
        with backend.lock(shared=True, purpose="pull"):
            pull_store(remote, backend, counter, bases=bases, force=force, timelines=timelines)

    retry_after_gc(pull_once, backend)
    return counter.done


def clone(
    url: Any,
    directory: PathLike,
    *,
    with_base: bool = False,
    base_directory: PathLike | None = None,
    timelines: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Transfer:
    """Make a store from a remote's content. Call it again to resume an interrupted clone.

    The other arguments and the result are those of :func:`pull`.

    Args:
        url: As in :func:`push`.
        directory: A new or empty directory, or an interrupted clone of the same remote.

    Raises:
        NotAStoreError: If the directory holds a store or other files, or there is no store at the
            URL.
        InvalidInputError: If the directory is inside a store.
        StoreError: As in :func:`pull`.
    """
    remote, root = connect_remote(url, **options), _directory(directory)
    refuse_inside_store(root, "clone to")
    backend, address = LocalBackend(root), remote.describe("").encode()
    config = read_config(require_store(RemoteBackend(remote)))
    begun = backend.read(_CLONING) if backend.exists(_CLONING) else None
    if begun is None:
        if backend.exists(CONFIG):
            raise NotAStoreError(f"{root} already holds a store: use msft-store pull")
        if any(not path.startswith(f"{TEMPORARY}/") for path in backend.list("")):
            raise NotAStoreError(f"{root} is not empty and not a store; choose a new directory")
        backend.make_root()
        write_atomic(backend, _CLONING, address)
    elif begun != address:
        raise NotAStoreError(
            f"{root} has part of a clone of {begun.decode(errors='replace')}: "
            "complete that clone, or choose a new directory"
        )
    else:
        _log.info("resuming the clone of %s in %s", remote.describe(""), root)
    if not backend.exists(CONFIG):
        create_store(root, config.version)
    transfer = pull(
        root,
        remote,
        with_base=with_base,
        base_directory=base_directory,
        timelines=timelines,
        progress=progress,
    )
    with backend.lock(shared=False, purpose="clone"):
        backend.delete(_CLONING)
    return transfer


def upgrade(url: Any, **options: Any) -> None:
    """Let a remote get the files of stores of the newest version; see :meth:`Store.upgrade`.

    Raises:
        ConflictError: If another process replaced ``store.json`` meanwhile.
        NotAStoreError: If there is no store at the URL.
        StorageError: If the remote cannot be reached, or is only read.
    """
    remote = connect_remote(url, **options)
    config = replace(read_config(require_store(RemoteBackend(remote))), version=NEWEST)
    found = remote.read_versioned(CONFIG, MAX_SMALL_FILE_BYTES)
    data = encode_config(config)
    if found is None or (found[0] != data and not remote.replace(CONFIG, data, found[1])):
        raise ConflictError(f"another process changes {remote.describe(CONFIG)}; upgrade again")


def remote_files(url: Any, *, bases: Iterable[PathLike] = (), **options: Any) -> Backend:
    """Return the files of a remote store, for reading; see :func:`~msft_store.store.open_remote`.

    Args:
        url: As in :func:`push`.
        bases: Paths of models on this machine that are bases of the store. They are read once, and
            only the returned store knows their places.
        **options: As in :func:`push`.

    Raises:
        NotAStoreError: If there is no store at the URL.
        BaseError: If a model is not one of the store's bases.
        StorageError: If the remote cannot be reached.
    """
    backend = require_store(RemoteBackend(connect_remote(url, **options)))
    known, records = set(list_bases(backend)), {}
    for path in bases:
        base = scan_base(check_path(path))
        if base.id not in known:
            raise BaseError(
                f"{path} is base {base.id[:12]}, which is none of {backend.describe('')}"
            )
        records[base_path(base.id)] = encode_base(base)
    return Overlay(backend, records) if records else backend


def retry_after_gc(transfer: Callable[[], None], target: Backend | None) -> None:
    """Run a transfer; if unreferenced records in the target prevent it, run gc there and retry."""
    try:
        transfer()
    except UnsoundTargetError as error:
        if target is None:
            raise
        _log.info("%s: running gc on %s and retrying", error, target.describe(""))
        evict(Catalog(target), [], rewrite_from=0.0)
        transfer()


def _directory(store: OpenStore | PathLike) -> Path:
    return check_path(store.path if isinstance(store, OpenStore) else store)
