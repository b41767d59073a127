"""Refs: named pointers to checkpoints. What a ref points to is never evicted.

One sealed JSON file each, ``refs/<name>.json``. A ref may carry a note (JSON), in which a timeline
says why it keeps a checkpoint.

Example::

    write_ref(backend, Ref(name="best", checkpoint=ckpt.id))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msft_store.backend import Backend, publish
from msft_store.errors import CorruptedError, InvalidInputError, StorageError
from msft_store.format import VERSION, seal, unseal

_FOLDER = "refs"
_SUFFIX = ".json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
_MAX_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A named pointer."""

    name: str
    checkpoint: str
    note: Mapping[str, Any] = field(default_factory=dict)


def check_name(name: str) -> str:
    """Return a ref's name; :class:`InvalidInputError` if it cannot be one."""
    if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} cannot be the name of a ref: use letters, digits, '.', '_', '+' and '-', "
            f"with '/' between parts, at most {_MAX_NAME} characters"
        )
    return name


def read_refs(backend: Backend) -> dict[str, Ref]:
    """Return all refs by name."""
    refs = {}
    for path in backend.list(_FOLDER):
        if not path.endswith(_SUFFIX):
            continue
        try:
            data = backend.read(path)
        except StorageError:
            # A ref may go between the listing and the look at it.
            if backend.exists(path):
                raise
            continue
        content = unseal(data, backend.describe(path), "msft-ref")
        name = path[len(_FOLDER) + 1 : -len(_SUFFIX)]
        target, note = content.get("checkpoint"), content.get("note")
        if content.get("name") != name or not isinstance(target, str) or not isinstance(note, dict):
            raise CorruptedError(f"{backend.describe(path)} does not hold the ref {name!r}")
        refs[name] = Ref(name=name, checkpoint=target, note=note)
    return refs


def write_ref(backend: Backend, ref: Ref) -> None:
    """Create or replace a ref."""
    content = {
        "format": "msft-ref",
        "version": VERSION,
        "name": check_name(ref.name),
        "checkpoint": ref.checkpoint,
        "note": dict(ref.note),
    }
    publish(backend, f"{_FOLDER}/{ref.name}{_SUFFIX}", seal(content))


def delete_ref(backend: Backend, name: str) -> None:
    """Remove a ref."""
    backend.delete(f"{_FOLDER}/{check_name(name)}{_SUFFIX}")
