"""The refs and metadata by which a timeline persists in a store.

The convention is section 7 of docs/FORMAT.md. Invariants: at whatever moment a timeline is killed,
the checkpoints that it had protected are found again. A timeline that has begun to close leaves
nothing to recover, because its other refs are deleted after a ref that marks it as closed is
written.

Example::

    found = read_timeline(store, "main")
    found.root, found.branch
    delete_refs(store, "main")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msft_store.errors import InvalidInputError
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.refs import TIMELINES
from msft_store.store import Store
from msft_store.timeline.room import NoRoom

KEY = "timeline"
"""Key of a checkpoint's metadata that holds its timeline, branch and index."""
ROOT = "root"
_CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class PersistedTimeline:
    """A timeline as an earlier process left it; all empty if there was none."""

    root: Checkpoint | None
    branch: int
    since: int
    """Creation time, in ns since 1970, of the newest checkpoint that is not the timeline's."""
    protected: tuple[Checkpoint, ...]
    """The checkpoints that its refs point to, the root included, oldest first."""
    foreign: frozenset[str]
    """Ids of protected checkpoints that it did not commit."""
    unprotected: tuple[Checkpoint, ...]
    """Its commits that no ref of it points to."""


def ref_of(timeline: str, part: str) -> str:
    """Return the name of a timeline's ref to its root, or to the checkpoint of an id."""
    return f"{TIMELINES}{timeline}/{part}"


def place_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the timeline, branch and index of a commit; empty for any other checkpoint."""
    place = checkpoint.metadata.get(KEY)
    if not isinstance(place, Mapping):
        return {}
    kinds = tuple(type(place.get(part)) for part in ("name", "branch", "index"))
    return place if kinds == (str, int, int) else {}


def read_timeline(store: Store, timeline: str) -> PersistedTimeline:
    """Return what an earlier timeline of this name left.

    A timeline that was closed, or killed while it closed, leaves nothing: all its checkpoints are
    older than ``since``.
    """
    if ref_of(timeline, _CLOSED) in store.refs():
        delete_refs(store, timeline)
    log, refs, notes = store.log(), _refs(store, timeline), store.notes()
    newest = max((checkpoint.created for checkpoint in log), default=0)
    since = min((_natural(notes[name].get("since")) for name in refs), default=newest)
    root = refs.get(ref_of(timeline, ROOT))
    named = {c.id for c in log if place_of(c).get("name") == timeline}
    given = {refs[name] for name in refs if notes[name].get("given")}
    kept = set(refs.values())
    return PersistedTimeline(
        root=None if root is None else store.get(root),
        branch=0 if root is None else _natural(notes[ref_of(timeline, ROOT)].get("branch")),
        since=since,
        protected=tuple(c for c in log if c.id in kept),
        foreign=frozenset(given | kept - named),
        unprotected=tuple(c for c in log if c.id in named - kept and c.created > since),
    )


def protect(store: Store, timeline: str, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Point a ref to each checkpoint by its id, with its note.

    If there is no room to replace the note of a protected checkpoint, the old note stays.
    """
    refs, known = _refs(store, timeline), store.notes()
    for identity, note in notes.items():
        name = ref_of(timeline, identity)
        if known.get(name) != note:
            try:
                store.pin(identity, name, note=note)
            except NoRoom:
                if identity not in refs.values():
                    raise


def _natural(value: object) -> int:
    # A note is JSON that any program may have written.
    return value if isinstance(value, int) and value >= 0 else 0


def delete_refs(store: Store, timeline: str) -> None:
    """Delete a timeline's refs; its checkpoints are then like any others."""
    with store.session("close"):
        refs, mark = _refs(store, timeline), ref_of(timeline, _CLOSED)
        if len(refs) > 1 and mark not in refs:
            # Without the mark, a kill between two deletions would make a checkpoint look like a
            # commit that was not protected yet.
            store.pin(next(iter(refs.values())), mark)
            refs[mark] = ""
        for name in sorted(refs, key=lambda name: name == mark):
            store.unpin(name)


def _refs(store: Store, timeline: str) -> dict[str, str]:
    prefix = ref_of(timeline, "")
    return {name: target for name, target in store.refs().items() if name.startswith(prefix)}


def check_metadata(metadata: Mapping[str, Any] | None) -> None:
    """Raise :class:`InvalidInputError` if the metadata of a commit has the timeline's own key."""
    if isinstance(metadata, Mapping) and KEY in metadata:
        raise InvalidInputError(f"the key {KEY!r} of metadata is the timeline's own")
