"""What a timeline leaves in a store: refs that protect, and a place in what it commits.

The convention of docs/FORMAT.md, section 7. Invariants: whatever moment a timeline was killed at,
what it had protected is found again; and once it has begun to close, nothing is taken for left over
from it, for the refs go after a mark that says so.

Example::

    traces = find(store, "main")
    traces.root, traces.branch
    release(store, "main")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msft_store.errors import InvalidInputError
from msft_store.objects.manifest import Checkpoint
from msft_store.saver import snapshot
from msft_store.store import Store
from msft_store.timeline.room import NoRoom

KEY = "timeline"
"""Of the metadata: where a commit's place stands."""
ROOT = "root"
_CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class Traces:
    """A timeline as an earlier one of its name left it; a new one finds nothing."""

    root: Checkpoint | None
    branch: int
    since: int
    """Nothing that was created by then is the timeline's to remove (ns since 1970)."""
    protected: tuple[Checkpoint, ...]
    """What its refs point to, the root included, oldest first."""
    foreign: frozenset[str]
    """Ids of those that it was given and did not commit."""
    strays: tuple[Checkpoint, ...]
    """What it committed and had not protected yet, or protected no more."""


def ref_of(timeline: str, part: str) -> str:
    """Return the name of a timeline's ref to its root, or to the checkpoint of an id."""
    return f"timelines/{timeline}/{part}"


def place_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return a commit's timeline, branch and index; nothing for what no timeline committed."""
    place = checkpoint.metadata.get(KEY)
    if not isinstance(place, Mapping):
        return {}
    kinds = tuple(type(place.get(part)) for part in ("name", "branch", "index"))
    return place if kinds == (str, int, int) else {}


def find(store: Store, timeline: str) -> Traces:
    """Return what an earlier timeline of this name left.

    One that was closed, or killed while it closed, leaves nothing: its checkpoints are older than
    ``since``.
    """
    if ref_of(timeline, _CLOSED) in store.refs():
        release(store, timeline)
    log, refs, notes = store.log(), _refs(store, timeline), store.notes()
    newest = max((checkpoint.created for checkpoint in log), default=0)
    since = min((_natural(notes[name].get("since")) for name in refs), default=newest)
    root = refs.get(ref_of(timeline, ROOT))
    named = {c.id for c in log if place_of(c).get("name") == timeline}
    given = {refs[name] for name in refs if notes[name].get("given")}
    kept = set(refs.values())
    return Traces(
        root=None if root is None else store.get(root),
        branch=0 if root is None else _natural(notes[ref_of(timeline, ROOT)].get("branch")),
        since=since,
        protected=tuple(c for c in log if c.id in kept),
        foreign=frozenset(given | kept - named),
        strays=tuple(c for c in log if c.id in named - kept and c.created > since),
    )


def protect(store: Store, timeline: str, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Point a ref to each checkpoint by its id, with its note.

    Where there is no room for another note of what is protected already, the old one stays.
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
    # A note is JSON of whoever wrote it.
    return value if isinstance(value, int) and value >= 0 else 0


def release(store: Store, timeline: str) -> None:
    """Remove a timeline's refs; what they point to is a checkpoint like any other then."""
    refs, mark = _refs(store, timeline), ref_of(timeline, _CLOSED)
    if len(refs) > 1 and mark not in refs:
        # Without it, what is no longer protected would be a stray while other refs are left.
        store.pin(next(iter(refs.values())), mark)
        refs[mark] = ""
    for name in sorted(refs, key=lambda name: name == mark):
        store.unpin(name)


def _refs(store: Store, timeline: str) -> dict[str, str]:
    prefix = ref_of(timeline, "")
    return {name: target for name, target in store.refs().items() if name.startswith(prefix)}


def facts_of(
    step: int | None, metrics: Mapping[str, float] | None, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what a commit says of itself, as it is now, by the keywords of ``Store.save``.

    :class:`InvalidInputError` for what no checkpoint can hold, and for a place of the caller's own.
    """
    if metadata is not None and KEY in metadata:
        raise InvalidInputError(f"the key {KEY!r} of metadata is the timeline's own")
    return snapshot(step=step, metrics=metrics, metadata=metadata)
