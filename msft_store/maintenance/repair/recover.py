"""Recover the content of damaged small files: config, base records, manifests and refs.

Invariants: nothing is written. A digest proves the recovered content, with two exceptions: a ref
may keep only the checkpoint that it names, and a config only its level, or the default level.

Example::

    overlay, why = mend(backend)
    Catalog(overlay).refresh()            # reads the mended files
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msft_store.codec.codecs import LEVELS, Level
from msft_store.errors import StoreError, is_damage
from msft_store.maintenance.repair.salvage import mended_manifest, mended_sealed
from msft_store.objects.bases import base_path, list_bases, read_base, rebuild_base_record
from msft_store.objects.catalog import CONFIG, read_level, write_config
from msft_store.objects.manifest import list_manifests, manifest_path, read_checkpoint, read_tensors
from msft_store.objects.refs import Ref, encode_ref, list_refs, read_ref, ref_name
from msft_store.storage.backend import Backend, read_small_file
from msft_store.storage.overlay import Overlay

_TOLD = "damaged; what was written could be told"
_PATH = re.compile(rb'"path":("(?:[^"\\]|\\.)*")')
_TARGET = re.compile(rb'"checkpoint":"([0-9a-f]{32})"')
_TIMELINES = "timelines/"

Way = Callable[[bytes], bytes | None]
"""Returns the right content of a file, given its damaged content, or ``None`` if it cannot."""


@dataclass(frozen=True, kw_only=True)
class _File:
    path: str
    check: Callable[[Backend], object]
    """Raises a :class:`StoreError` if the file is damaged."""
    ways: tuple[tuple[str, Way], ...]
    """Ways to recover the file, each after the text that describes it to the user."""

    def problem(self, backend: Backend) -> StoreError | None:
        try:
            self.check(backend)
        except StoreError as error:
            return error
        return None


def mend(backend: Backend) -> tuple[Overlay, dict[str, str]]:
    """Return the store with its small files recovered, and a reason for each of them, by path.

    Files that cannot be recovered keep their content. Raise :class:`StoreError` if the store has
    another version or the file system refuses to read it.
    """
    overlay, why = Overlay(backend), dict[str, str]()
    for file in _files(backend):
        problem = file.problem(overlay)
        there = backend.exists(file.path)
        if problem is None or not (there or file.path == CONFIG):
            continue
        if there and not is_damage(problem):
            raise problem
        data = _read(backend, file.path) if there else b""
        for said, way in file.ways:
            mended = way(data)
            if mended is not None:
                overlay.replaced[file.path] = mended
                if file.problem(overlay) is None:
                    why[file.path] = said
                    break
                del overlay.replaced[file.path]
    return overlay, why


def _files(backend: Backend) -> Iterator[_File]:
    lost = "damaged or gone; its level is not known, and fast is taken"
    yield _File(
        path=CONFIG,
        check=read_level,
        ways=(
            (_TOLD, mended_sealed),
            *((f"damaged; its level is {level}", _config_of(level)) for level in LEVELS),
            (lost, lambda data: write_config(LEVELS[0])),
        ),
    )
    for identity in list_bases(backend):
        yield _File(
            path=base_path(identity),
            check=partial(read_base, identity=identity),
            ways=((_TOLD, mended_sealed), ("damaged; recorded anew from the model", _base_again)),
        )
    for identity in list_manifests(backend):
        yield _File(
            path=manifest_path(identity),
            check=partial(_read_manifest, identity=identity),
            ways=((_TOLD, mended_manifest),),
        )
    for path in list_refs(backend):
        yield _File(
            path=path,
            check=partial(read_ref, path=path),
            ways=((_TOLD, mended_sealed), ("damaged; its note is lost", _ref_again(backend, path))),
        )


def _read_manifest(backend: Backend, identity: str) -> None:
    read_tensors(backend, read_checkpoint(backend, identity))


def _read(backend: Backend, path: str) -> bytes:
    try:
        return read_small_file(backend, path)
    except StoreError as error:
        if not is_damage(error):
            raise
        return b""


def _config_of(level: Level) -> Way:
    return lambda data: write_config(level) if f'"level":"{level}"'.encode() in data else None


def _base_again(data: bytes) -> bytes | None:
    """Build the record again from the model at the path that the damaged record names."""
    found = _PATH.search(data)
    try:
        return None if found is None else rebuild_base_record(Path(str(json.loads(found[1]))))[1]
    except (StoreError, ValueError):
        return None


def _ref_again(backend: Backend, path: str) -> Way:
    def again(data: bytes) -> bytes | None:
        found, name = _TARGET.search(data), ref_name(path)
        # The ref of a timeline is useless without its note.
        if found is None or name.startswith(_TIMELINES):
            return None
        target = found[1].decode()
        known = backend.exists(manifest_path(target))
        return encode_ref(Ref(name=name, checkpoint=target)) if known else None

    return again
