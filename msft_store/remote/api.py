"""Stores that move about: push to an object store, pull and clone from it, read one in place.

A remote has the same files as a store's directory, under a URL: ``s3://bucket/run``,
``gs://…``, ``az://…``, ``file:///…``, or whatever fsspec has a file system for (``pip install
'msft-store[remote]'``). Only what is missing goes, and chunks are compared with their
keys before they do. A cut connection is tried again; what went whole before it broke does not go
again when the command is repeated. Nothing on a remote is ever deleted.

Example::

    from msft_store.remote.api import clone, open_remote, pull, push

    push("run/store", "s3://bucket/run", with_base=True)
    clone("s3://bucket/run", "elsewhere/store", with_base=True)
    pull("elsewhere/store", "s3://bucket/run")           # later: what came since
    open_remote("s3://bucket/run", bases=["models/qwen"]).load("best")

Or ``msft-store push run/store s3://bucket/run --with-base``, and so on.

**Order.** ``store.json``, bases, packs, manifests, refs: whoever reads meanwhile sees whole
checkpoints only. A file that is there in its size is not sent again. A manifest or the record of a
base that is there and sound stays as it is: ``anchor``, ``rebase`` and ``relocate`` change only
what is beside their content.

**Refs.** They follow the source, by conditional writes. One that points in the target to a
checkpoint which the source does not have was moved by somebody else: :class:`ConflictError`, before
anything goes, unless ``force``. Refs that are removed stay on the other side. The refs of timelines
are a running process's own and stay at home, but for ``timelines=True``, which moves a run to
another machine.

**Bases.** A base's files go along only ``with_base``. Without, tell a clone where the model is:
``Store.relocate``. Until then, chunks that are changes of the base cannot be compared with their
keys (``Transfer.unverified``); every ``load`` does it, and so does ``check``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msft_store._util import PathLike, check_path
from msft_store.errors import BaseError, NotAStoreError
from msft_store.maintenance.gc import evict
from msft_store.objects.bases import base_path, list_bases, rebuild_base_record
from msft_store.objects.catalog import CONFIG, Catalog, read_consistently, read_level
from msft_store.remote.backend import RemoteBackend
from msft_store.remote.missing_packs import UnsoundTargetError
from msft_store.remote.pull import fetch
from msft_store.remote.push import send
from msft_store.remote.transfer import Progress, Tally, Transfer
from msft_store.remote.transport.url import remote_at
from msft_store.storage.backend import TEMPORARY, Backend, LocalBackend, write_atomic
from msft_store.storage.overlay import Overlay
from msft_store.storage.quota import QuotaBackend
from msft_store.store import Store

_TIMES = 5
"""How often a push begins anew because a gc took away what it was to send, before it locks."""
_CLONING = f"{TEMPORARY}/cloning"
"""Stands in a clone until it is complete."""


def push(
    store: Store | PathLike,
    url: Any,
    *,
    with_base: bool = False,
    force: bool = False,
    timelines: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Transfer:
    """Send what a remote lacks of a store; it becomes one if there is nothing yet.

    Checkpoints may be saved and evicted meanwhile. ``url`` is a URL, a path or an obstore store,
    ``options`` are its own. ``with_base`` sends the files of bases too. ``force`` moves refs that
    others moved. ``progress`` is called with a step (``"send"``), its bytes so far and all of them
    (0: not known), one call at a time, from several threads. :class:`ConflictError` names refs that
    others moved, :class:`CorruptedError` damaged files; :class:`StorageError` tells that the remote
    cannot be reached or refuses.
    """
    backend, remote = LocalBackend(_directory(store)), remote_at(url, **options)
    tally = Tally(progress=progress)

    def attempt() -> None:
        catalog = Catalog(backend)
        send(catalog, remote, tally, with_base=with_base, force=force, timelines=timelines)

    def whole() -> None:
        read_consistently(backend, attempt, times=_TIMES)

    directory = getattr(remote, "backend", None)
    _despite_leftovers(whole, directory)
    return tally.result()


def pull(
    store: Store | PathLike,
    url: Any,
    *,
    with_base: bool = False,
    base_directory: PathLike | None = None,
    force: bool = False,
    timelines: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Transfer:
    """Fetch what a store lacks of a remote; verified before any of it is in place.

    ``with_base`` also fetches the files of bases that are not where the store looks for them, to
    ``base_directory/<base id>`` (by default ``<store>-bases``, beside the store). A gc waits
    meanwhile. Errors as of :func:`push`, and :class:`NotAStoreError` if no store is at the URL.
    """
    backend, remote = QuotaBackend(LocalBackend(_directory(store))), remote_at(url, **options)
    bases = _base_directory(backend, base_directory) if with_base else None
    tally = Tally(progress=progress)

    def whole() -> None:
        with backend.lock(shared=True, purpose="pull"):
            fetch(remote, backend, tally, bases=bases, force=force, timelines=timelines)

    _despite_leftovers(whole, backend)
    return tally.result()


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
    """Make a store of a remote's content in a new or empty directory; arguments as of :func:`pull`.

    One that was cut off is repeated in the same way, and goes on. :class:`NotAStoreError` if the
    directory has a store or something else in it, or if no store is at the URL.
    """
    remote, root = remote_at(url, **options), _directory(directory)
    backend, here = LocalBackend(root), remote.describe("").encode()
    level = read_level(_store_at(RemoteBackend(remote)))
    begun = backend.read(_CLONING) if backend.exists(_CLONING) else None
    if begun is None:
        if backend.exists(CONFIG):
            raise NotAStoreError(f"there is a store at {root} already: use msft-store pull")
        if any(not path.startswith(f"{TEMPORARY}/") for path in backend.list("")):
            raise NotAStoreError(f"{root} is not empty and not a store; choose a new directory")
        backend.make_root()
        write_atomic(backend, _CLONING, here)
    elif begun != here:
        raise NotAStoreError(
            f"{root} has part of a clone of {begun.decode(errors='replace')}: "
            "complete that, or choose a new directory"
        )
    if not backend.exists(CONFIG):
        Store.create(root, level=level)
    done = pull(
        root,
        remote,
        with_base=with_base,
        base_directory=base_directory,
        timelines=timelines,
        progress=progress,
    )
    with backend.lock(shared=False, purpose="clone"):
        backend.delete(_CLONING)
    return done


def open_remote(url: Any, *, bases: Iterable[PathLike] = (), **options: Any) -> Store:
    """Open a store where it is, to be read: ``log``, ``load``, ``chunks``, ``export``, ``check``.

    ``bases`` are paths of models on this machine that the store has as bases; they are read once,
    and where they are is remembered by the returned store alone. All that would write is a
    :class:`StorageError`. :class:`NotAStoreError` if no store is at the URL, :class:`BaseError`
    for a model that is none of its bases.
    """
    backend = RemoteBackend(remote_at(url, **options))
    overlay = Overlay(_store_at(backend))
    known = set(list_bases(backend))
    for path in bases:
        identity, record = rebuild_base_record(check_path(path))
        if identity not in known:
            raise BaseError(f"{path} is base {identity[:12]}, none of {backend.describe('')}")
        overlay.replaced[base_path(identity)] = record
    return Store(overlay if overlay.replaced else backend)


def _store_at(backend: RemoteBackend) -> RemoteBackend:
    if not backend.exists(CONFIG):
        raise NotAStoreError(f"no store at {backend.describe('')}; send one there with push")
    return backend


def _despite_leftovers(act: Callable[[], None], target: Backend | None) -> None:
    """Do something once more after a gc where what a gc left in the target is in its way."""
    try:
        act()
    except UnsoundTargetError:
        if target is None:
            raise
        evict(Catalog(target), [], rewrite_from=0.0)
        act()


def _directory(store: Store | PathLike) -> Path:
    return check_path(store.path if isinstance(store, Store) else store)


def _base_directory(backend: QuotaBackend, given: PathLike | None) -> Path:
    if given is not None:
        return check_path(given)
    root = Path(backend.describe("").rstrip("/"))
    return root.parent / f"{root.name}-bases"
