"""Recover the content of damaged small files: config, base records, manifests and refs.

Invariants: nothing is written. A digest proves the recovered content, with two exceptions: a ref
may keep only the checkpoint that it names, and a config is written anew. It then states the latest
version of the store's files.

Example::

    overlay, reasons = recover_files(backend)
    Catalog(overlay).refresh()            # reads the recovered files
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msft_store.errors import BaseError, StoreError, is_damage
from msft_store.format.layout import VERSIONS
from msft_store.format.pack_footer import PACK_HEADER, decode_header
from msft_store.maintenance.repair.extract import extract_manifest, extract_sealed
from msft_store.objects.bases import base_path, encode_base, list_bases, read_base, scan_base
from msft_store.objects.catalog import CONFIG, Config, encode_config, read_config
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import list_manifests, manifest_path, read_version
from msft_store.objects.packs import list_packs
from msft_store.objects.refs import TIMELINES, Ref, encode_ref, list_refs, read_ref, ref_path
from msft_store.objects.tables import TensorTables
from msft_store.storage.backend import Backend, read_small_file
from msft_store.storage.overlay import Overlay

_EXTRACTED = "damaged; its content was recovered"
_PATH = re.compile(rb'"path":("(?:[^"\\]|\\.)*")')
_TARGET = re.compile(rb'"checkpoint":"([0-9a-f]{32})"')

Recovery = Callable[[bytes], bytes | None]
"""Returns the right content of a file, given its damaged content, or ``None`` if it cannot."""


@dataclass(frozen=True, kw_only=True)
class _File:
    path: str
    check: Callable[[Backend], object]
    """Raises a :class:`StoreError` if the file is damaged."""
    recoveries: tuple[tuple[str, Recovery], ...]
    """The recoveries to try, each after the text that describes it to the user."""

    def problem(self, backend: Backend) -> StoreError | None:
        try:
            self.check(backend)
        except StoreError as error:
            return error
        return None


def recover_files(backend: Backend) -> tuple[Overlay, dict[str, str]]:
    """Return the store with its small files recovered, and a reason for each of them, by path.

    Files that cannot be recovered keep their content. Raise :class:`StoreError` if the store has
    another version or the file system refuses to read it.
    """
    overlay, reasons = Overlay(backend), dict[str, str]()
    for file in _files(overlay):
        problem = file.problem(overlay)
        exists = backend.exists(file.path)
        if problem is None or not (exists or file.path == CONFIG):
            continue
        if exists and not is_damage(problem):
            raise problem
        data = _read(backend, file.path) if exists else b""
        for reason, recover in file.recoveries:
            recovered = recover(data)
            if recovered is not None:
                overlay.replaced[file.path] = recovered
                if file.problem(overlay) is None:
                    reasons[file.path] = reason
                    break
                del overlay.replaced[file.path]
    return overlay, reasons


def _files(backend: Backend) -> Iterator[_File]:
    yield _File(
        path=CONFIG,
        check=read_config,
        recoveries=(
            (_EXTRACTED, extract_sealed),
            (
                "damaged or missing; written again",
                lambda data: encode_config(Config(version=_latest_version(backend))),
            ),
        ),
    )
    for identity in list_bases(backend):
        yield _File(
            path=base_path(identity),
            check=partial(read_base, identity=identity),
            recoveries=(
                (_EXTRACTED, extract_sealed),
                ("damaged; recorded again from the model", _rebuild_base),
            ),
        )
    # Bases are recovered at this point.
    objects = ChunkStore(backend)
    tables = TensorTables(backend, lambda identity: objects.base(identity).base)
    for identity in list_manifests(backend):
        yield _File(
            path=manifest_path(identity),
            check=partial(_read_manifest, tables, identity),
            recoveries=((_EXTRACTED, extract_manifest),),
        )
    for name in list_refs(backend):
        yield _File(
            path=ref_path(name),
            check=partial(read_ref, path=ref_path(name)),
            recoveries=(
                (_EXTRACTED, extract_sealed),
                ("damaged; its note is lost", partial(_rebuild_ref, backend, name)),
            ),
        )


def _read_manifest(tables: TensorTables, identity: str, backend: Backend) -> None:
    # A checkpoint whose base has no record waits for it.
    with contextlib.suppress(BaseError):
        tables.verify(backend, identity)


def _read(backend: Backend, path: str) -> bytes:
    try:
        return read_small_file(backend, path)
    except StoreError as error:
        if not is_damage(error):
            raise
        return b""


def _latest_version(backend: Backend) -> int:
    """Return the latest version that a manifest or pack states; no other file depends on it."""
    found = {VERSIONS[0]}
    for identity in list_manifests(backend):
        with contextlib.suppress(StoreError):
            found.add(read_version(backend, identity))
    for path in list_packs(backend):
        with contextlib.suppress(StoreError):
            found.add(decode_header(backend.read(path, 0, PACK_HEADER.size), path))
    return max(found)


def _rebuild_base(data: bytes) -> bytes | None:
    """Build the record again from the model at the path that the damaged record names."""
    found = _PATH.search(data)
    try:
        return None if found is None else encode_base(scan_base(Path(str(json.loads(found[1])))))
    except (StoreError, ValueError):
        return None


def _rebuild_ref(backend: Backend, name: str, data: bytes) -> bytes | None:
    found = _TARGET.search(data)
    # The ref of a timeline is useless without its note.
    if found is None or name.startswith(TIMELINES):
        return None
    target = found[1].decode()
    exists = backend.exists(manifest_path(target))
    return encode_ref(Ref(name=name, checkpoint=target)) if exists else None
