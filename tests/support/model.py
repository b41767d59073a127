"""A store as plain dictionaries: its expected content, and the states that a crash may leave.

Invariant: no code of the store computes the model. A change is made on a copy of the model;
``between`` checks that the store after a crash lies between the model before the change and the
one after it: each checkpoint and each ref is as in one of them, and none that both have is lost.

Example::

    after = model.copy()
    after.forget(identity)
    model = between(model, after, Store.open(path))       # AssertionError: it lies outside
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from msft_store import Candidate, Checkpoint, Store
from tests.support.naive import Parts, kept, metrics_of
from tests.support.states import State, bits_of, logical_bytes

NEW = "new"
"""Stands for the id of a checkpoint that does not exist yet."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A checkpoint."""

    state: State
    parent: str | None = None
    base: str | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created: float = math.inf

    @property
    def content(self) -> str:
        """Text that two points have in common if and only if they are one checkpoint."""
        tensors = {
            name: (str(tensor.dtype), tuple(tensor.shape), bits_of(tensor))
            for name, tensor in sorted(self.state.items())
        }
        facts = (self.step, sorted(self.metrics.items()), self.tags, self.metadata)
        return repr((self.parent, self.base, facts, tensors))

    @property
    def position(self) -> Mapping[str, Any]:
        """Its position on its timeline."""
        return self.metadata.get("timeline", {})

    def agrees(self, found: Checkpoint) -> bool:
        """Return whether a listing tells of this point."""
        return (
            (self.parent, self.base, self.step, self.tags)
            == (found.parent, found.base, found.step, tuple(found.tags))
            and repr(sorted(self.metrics.items())) == repr(sorted(found.metrics.items()))
            and self.metadata == found.metadata
            and logical_bytes(self.state) == found.logical_bytes
            and self.created in (math.inf, found.created)
        )


@dataclass(kw_only=True)
class Line:
    """A timeline that is open in this process."""

    name: str
    start: str | None
    parts: Parts
    since: float = 0
    root: str | None = None
    branch: int = 0
    next: int = 0
    counted: bool = False
    members: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)

    def note(self, identity: str, **more: Any) -> dict[str, Any]:
        """Return the note of a ref, without its reasons."""
        given = {"given": True} if identity in self.given else {}
        return {**more, **given, "since": self.since}


@dataclass(kw_only=True)
class Model:
    """The expected content of a store."""

    points: dict[str, Point] = field(default_factory=dict)
    refs: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """The checkpoint and the note of each, by name."""
    lines: dict[str, Line] = field(default_factory=dict)

    def copy(self) -> Model:
        """Return a copy that changes alone; tensors never change."""
        lines = {
            name: replace(line, members=set(line.members), given=set(line.given))
            for name, line in self.lines.items()
        }
        return Model(points=dict(self.points), refs=dict(self.refs), lines=lines)

    def add(self, point: Point) -> str:
        """Save; return the id, or ``NEW``."""
        content = point.content
        for identity, known in self.points.items():
            if known.step == point.step and known.content == content:
                return identity
        self.points[NEW] = point
        return NEW

    def protected(self, identity: str) -> bool:
        """Return whether a ref points to a checkpoint."""
        return any(target == identity for target, _ in self.refs.values())

    def evict(self, identities: Iterable[str]) -> None:
        """Forget those of some checkpoints that nothing protects."""
        for identity in identities:
            if identity in self.points and not self.protected(identity):
                del self.points[identity]

    def in_order(self, identities: Iterable[str]) -> list[str]:
        """Return ids, the oldest first."""
        return sorted(identities, key=lambda i: (self.points[i].created, i))

    def unknown_metric(self, parts: Parts) -> bool:
        """Return whether a gc has to refuse a policy."""
        measured = {
            metric
            for point in self.points.values()
            for metric, value in point.metrics.items()
            if math.isfinite(value)
        }
        return bool(self.points) and not metrics_of(parts) <= measured

    def collect(self, parts: Parts) -> None:
        """Run a gc with a policy."""
        candidates = [
            Candidate(
                id=identity,
                metrics=self.points[identity].metrics,
                index=index,
                pinned="a ref" if self.protected(identity) else None,
            )
            for index, identity in enumerate(self.in_order(self.points))
        ]
        self.evict(self.points.keys() - kept(parts, candidates))

    def refs_of(self, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return the refs of a timeline."""
        prefix = f"timelines/{name}/"
        return {ref: target for ref, target in self.refs.items() if ref.startswith(prefix)}

    def strays(self, name: str) -> set[str]:
        """Return the leftovers of an earlier timeline that the next one of its name deletes."""
        refs = self.refs_of(name)
        if not refs or f"timelines/{name}/closed" in refs:
            return set()
        since = min(note.get("since", 0) for _, note in refs.values())
        return {
            identity
            for identity, point in self.points.items()
            if point.position.get("name") == name
            and point.created > since
            and identity not in {target for target, _ in refs.values()}
        }

    def take_up(self, name: str, start: str | None, parts: Parts) -> None:
        """Open a timeline, or continue an earlier one of its name; ``start``: a checkpoint."""
        strays = self.strays(name)
        if f"timelines/{name}/closed" in self.refs:
            self.close(name)
        refs = self.refs_of(name)
        newest = max((point.created for point in self.points.values()), default=0)
        line = Line(name=name, start=start, parts=parts, since=newest)
        if refs:
            line.since = min(note.get("since", 0) for _, note in refs.values())
            line.members = {target for target, _ in refs.values()}
            line.given = {target for target, note in refs.values() if note.get("given")} | {
                target
                for target in line.members
                if self.points[target].position.get("name") != name
            }
        root = refs.get(f"timelines/{name}/root")
        self.lines[name] = line
        self._give_up(line, strays - {start})
        if root is not None:
            line.root, line.branch = root[0], root[1]["branch"]
        elif start in self.points:
            self._set_root(line, start)
        line.next = 1 + max((self.index(line, i) for i in self._current(line)), default=-1)

    def refuses(self, line: Line, metrics: Mapping[str, float]) -> bool:
        """Return whether a commit is refused, because it and all others would be evicted."""
        ranked = metrics_of(line.parts)
        known = set(metrics).union(*(self.points[i].metrics for i in self._there(line)))
        alone = [Candidate(id=NEW, metrics=metrics, branch=line.branch, index=line.next)]
        return bool(metrics and ranked) and known.isdisjoint(ranked) and not kept(line.parts, alone)

    def commit(self, name: str, point: Point) -> set[str]:
        """Save on a timeline, protect and evict; return what was kept."""
        line = self.lines[name]
        line.members.add(self.add(point))
        keep = self._protect(line)
        self._give_up(line, line.members - keep)
        line.next, line.counted = line.next + 1, True
        return keep

    def rollback(self, name: str, target: str) -> set[str]:
        """Begin a branch, protect and evict; return what was kept."""
        line = self.lines[name]
        line.branch += 1
        self._set_root(line, target)
        line.next, line.counted = 1, True
        keep = self._protect(line)
        self._give_up(line, line.members - keep)
        return keep

    def rewind(self, name: str, index: int) -> None:
        """Evict the checkpoints of a branch from a number on."""
        line = self.lines[name]
        later = {i for i in self._current(line) if self.index(line, i) >= index}
        self._give_up(line, later - {line.root})
        line.next = index

    def close(self, name: str) -> None:
        """Drop a timeline's refs."""
        for ref in self.refs_of(name):
            del self.refs[ref]
        self.lines.pop(name, None)

    def index(self, line: Line, identity: str) -> int:
        """Return the number of a checkpoint on its branch, as a policy sees it."""
        outside = identity == line.root or identity in line.given
        return 0 if outside else self.points[identity].position["index"]

    def _branch(self, line: Line, identity: str) -> int:
        if identity == line.root:
            return line.branch
        return -1 if identity in line.given else self.points[identity].position["branch"]

    def _there(self, line: Line) -> set[str]:
        return line.members & self.points.keys()

    def _current(self, line: Line) -> set[str]:
        return {i for i in self._there(line) if self._branch(line, i) == line.branch}

    def _set_root(self, line: Line, target: str) -> None:
        if target not in line.members:
            line.given.add(target)
        line.members.add(target)
        line.root = target
        self.refs[f"timelines/{line.name}/root"] = (target, line.note(target, branch=line.branch))

    def _protect(self, line: Line) -> set[str]:
        line.members = self._there(line)
        candidates = [
            Candidate(
                id=identity,
                metrics=self.points[identity].metrics,
                branch=self._branch(line, identity),
                index=self.index(line, identity),
                pinned="root" if identity == line.root else None,
            )
            for identity in self.in_order(line.members)
        ]
        keep = kept(line.parts, candidates)
        for identity in keep:
            self.refs[f"timelines/{line.name}/{identity}"] = (identity, line.note(identity))
        return keep

    def _give_up(self, line: Line, identities: Collection[str]) -> None:
        identities = set(identities)
        for identity in identities:
            self.refs.pop(f"timelines/{line.name}/{identity}", None)
        self.evict(
            i
            for i in identities & self.points.keys()
            if i not in line.given and self.points[i].created > line.since
        )
        line.members -= identities

    def named(self, found: Mapping[str, Checkpoint]) -> Model:
        """Return the model with the id and time of the new checkpoint, if it was found."""
        fresh = found.keys() - self.points.keys()
        if NEW not in self.points or not fresh:
            return self
        (identity,) = fresh
        named = self.copy()
        created = found[identity].created
        assert all(created > point.created for i, point in self.points.items() if i != NEW)
        named.points[identity] = replace(named.points.pop(NEW), created=created)
        named.refs = {
            name.replace(f"/{NEW}", f"/{identity}"): (identity if to == NEW else to, note)
            for name, (to, note) in self.refs.items()
        }
        for line in named.lines.values():
            line.members = {identity if i == NEW else i for i in line.members}
        return named

    def assert_equals(self, store: Store) -> None:
        """Assert that a store lists exactly the checkpoints and refs of the model."""
        found = {ckpt.id: ckpt for ckpt in store.log()}
        assert found.keys() == self.points.keys()
        assert all(point.agrees(found[identity]) for identity, point in self.points.items())
        assert refs_in(store) == self.refs


def refs_in(store: Store) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the refs of a store with their notes, without the reasons, which are for people."""
    refs, notes = store.refs(), store.notes()
    return {
        name: (refs[name], {key: notes[name][key] for key in notes[name] if key != "reasons"})
        for name in refs
    }


def between(
    before: Model,
    after: Model,
    store: Store,
    *,
    born: Point | None = None,
    passing: str = "",
    protects_first: bool = False,
) -> Model:
    """Return the model of a store after a crash during a change; assert that the state is allowed.

    ``born`` is a checkpoint that may be there even if it is not to stay; ``passing`` is the name of
    a ref that comes and goes on the way. ``protects_first``: nothing is given up before what is new
    is there and protected.
    """
    found, refs = {ckpt.id: ckpt for ckpt in store.log()}, refs_in(store)
    fresh = {identity: found[identity] for identity in found.keys() - before.points.keys()}
    points = {**after.named(fresh).points, **before.points}
    if born is not None and NEW not in after.points:
        points |= {i: replace(born, created=ckpt.created) for i, ckpt in fresh.items()}
    after = after.named(fresh)
    assert found.keys() <= points.keys(), "a checkpoint came from nowhere"
    assert before.points.keys() & after.points.keys() <= found.keys(), "a checkpoint was lost"
    assert all(points[identity].agrees(found[identity]) for identity in found)
    for name in refs.keys() | before.refs.keys() | after.refs.keys():
        allowed = (before.refs.get(name), after.refs.get(name))
        assert refs.get(name) in allowed or name == passing, f"ref {name}: {refs.get(name)}"
    if protects_first and not before.points.keys() <= found.keys():
        assert after.points.keys() - before.points.keys() <= found.keys()
        assert all(refs.get(name) == to for name, to in after.refs.items())
    left = before.copy()
    left.points, left.refs = {identity: points[identity] for identity in found}, refs
    for name in {ref.split("/")[1] for ref in refs if ref.startswith("timelines/")}:
        safe = before.points.keys() & after.points.keys() - before.strays(name)
        assert not left.strays(name) & safe, "the next timeline would remove what was kept"
    return left
