"""Read and write refs: named pointers to checkpoints.

Each ref is one sealed JSON file, ``refs/<name>.json``. A timeline uses the note of a ref, a JSON
object, to record its reasons. Invariant: a checkpoint that a ref points to is never evicted.

Example::

    write_ref(backend, Ref(name="best", checkpoint=ckpt.id))
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msft_store.errors import (
    REPAIR_HINT,
    CorruptedError,
    InvalidInputError,
    StoreError,
    strip_frames,
)
from msft_store.format.layout import VERSION, seal, unseal
from msft_store.format.strict_json import check_id, check_shallow_object
from msft_store.storage.backend import Backend, list_names, read_small_file, write_atomic

REFS = "refs"
TIMELINES = "timelines/"
"""Beginning of the names of the refs of timelines."""
VERSIONS = "versions/"
"""Beginning of the names of the refs of published versions."""
LEASES = "leases/"
"""Beginning of the names of the refs by which followers lease versions."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
_MAX_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A named pointer to a checkpoint, with a JSON object as its note."""

    name: str
    checkpoint: str
    note: Mapping[str, Any] = field(default_factory=dict)


def has_ended(ref: Ref, now: int) -> bool:
    """Return True if a ref is a lease that ended before ``now``, in nanoseconds since 1970."""
    until = ref.note.get("until")
    return ref.name.startswith(LEASES) and not (type(until) is int and until > now)


def check_ref_name(name: str) -> str:
    """Return ``name``; :class:`InvalidInputError` if it is not a valid name of a ref."""
    if not isinstance(name, str) or not _is_name(name):
        raise InvalidInputError(
            f"{name!r} cannot be the name of a ref: use letters, digits, '.', '_', '+' and '-', "
            f"with '/' between parts, at most {_MAX_NAME} characters"
        )
    return name


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


class RefReader:
    """Reads all refs of a store; rereads only files that were written since the last read."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[str, tuple[Hashable, Ref]] = {}

    def read(self) -> dict[str, Ref]:
        """Return all refs by name; :class:`StoreError` if a ref cannot be read."""
        refs, damaged = self.scan()
        for error in damaged.values():
            raise error
        return refs

    def scan(self) -> tuple[dict[str, Ref], dict[str, StoreError]]:
        """Return the readable refs by name, and the errors of the others by path."""
        known: dict[str, tuple[Hashable, Ref]] = {}
        damaged: dict[str, StoreError] = {}
        for path, found in self._backend.scan(REFS).items():
            if not path.endswith(".json"):
                continue
            version, ref = self._known.get(path, (None, None))
            try:
                if ref is None or version is None or version != found.version:
                    ref = read_ref(self._backend, path)
                known[path] = (found.version, ref)
            except StoreError as error:
                # Another process may delete a ref after the scan.
                if self._backend.exists(path):
                    damaged[path] = strip_frames(error)
        # Replace the dictionary, because other threads may read it at the same time.
        self._known = known
        return {ref.name: ref for _, ref in known.values()}, damaged


def list_refs(backend: Backend) -> list[str]:
    """Return the names of all refs."""
    return list_names(backend, REFS)


def ref_path(name: str) -> str:
    """Return the path of a ref's file."""
    return f"{REFS}/{name}.json"


def read_ref(backend: Backend, path: str) -> Ref:
    """Return the ref at a path."""
    return parse_ref(read_small_file(backend, path), path, backend.describe(path))


def parse_ref(data: bytes, path: str, what: str) -> Ref:
    """Return the ref that is or will be at a path, from its bytes; ``what`` is for messages."""
    content = unseal(data, what, "msft-ref")
    name = path.removeprefix(f"{REFS}/").removesuffix(".json")
    try:
        target = check_id(content.get("checkpoint"))
        note = check_shallow_object(content.get("note"))
        if content.get("name") != name or not _is_name(name):
            raise ValueError("it has another name")
    except ValueError as error:
        raise CorruptedError(
            f"{what} does not hold the ref {name!a:.80}: {error}; {REPAIR_HINT}", file=what
        ) from None
    return Ref(name=name, checkpoint=target, note=note)


def write_ref(backend: Backend, ref: Ref) -> None:
    """Create or replace a ref."""
    write_atomic(backend, ref_path(check_ref_name(ref.name)), encode_ref(ref))


def encode_ref(ref: Ref) -> bytes:
    """Return the content of a ref's file."""
    if not isinstance(ref.note, Mapping):
        raise InvalidInputError(f"the note of {ref.name!r} must be a mapping, not {ref.note!r}")
    content = {
        "format": "msft-ref",
        "version": VERSION,
        "name": ref.name,
        "checkpoint": ref.checkpoint,
        "note": dict(ref.note),
    }
    try:
        data = seal(content)
        check_shallow_object(content["note"])
    except ValueError as error:
        raise InvalidInputError(f"the note of {ref.name!r} cannot be kept: {error}") from None
    return data


def delete_ref(backend: Backend, name: str) -> None:
    """Delete a ref."""
    backend.delete(ref_path(check_ref_name(name)))
