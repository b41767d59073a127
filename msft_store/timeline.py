"""A rollback algorithm's view of a store: commit, roll back, evict under a policy.

A timeline is a line of commits on branches. The first branch starts from the base; every roll-back
starts another one from the checkpoint that it restores, the branch's *root*. What must stay (the
root, and what the policy keeps) is protected by refs ``timelines/<name>/…`` while the timeline
lives, so that a gc of another process cannot hurt it; everything else is evicted at once.

Invariants: a new checkpoint is durable and protected before an old one is given up, and a roll-back
is restored and verified before anything is. A timeline that was killed is taken up again under its
name, and what it had not protected yet is removed. A checkpoint that a timeline did not commit
itself, but was given as a start or to roll back to, is never evicted by it.

``commit_async`` is ``commit`` in the background, on a copy of the tensors: the same checkpoint with
the same id, under the policy that was set when it was called. One commit is under way at a time.
Everything else that a timeline does or tells first waits for it, and raises its error unless the
future was asked for it; only ``root`` and ``branch`` do not, which a commit leaves as they are.

Example::

    timeline = Timeline(store, base, retention=Champions({"arith": "max"}) | KeepBest("overall"))
    ckpt = timeline.commit(model.state_dict(), step=10, metrics={"arith": 0.4, "overall": 0.4})
    future = timeline.commit_async(model, step=20, metrics={"arith": 0.3, "overall": 0.5})
    timeline.rollback(ckpt, into=model)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from msft_store.bases import Base
from msft_store.errors import InvalidInputError
from msft_store.gc import GcResult
from msft_store.manifest import Checkpoint
from msft_store.refs import check_name
from msft_store.resident import Compared, Resident
from msft_store.retention import Candidate, Policy
from msft_store.saver import Background, State, snapshot
from msft_store.store import Store

_KEY = "timeline"
_ROOT = "root"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What a commit or a roll-back did."""

    checkpoint: Checkpoint
    kept: Mapping[str, tuple[str, ...]]
    """What stays, by id, with reasons."""
    dropped: tuple[str, ...]
    """Ids of what was evicted."""
    peak_bytes: int
    """Bytes of the whole store, temporary files included, at the worst moment."""
    bytes: int
    """Bytes of the whole store after eviction."""


class Timeline:
    """Commits, roll-backs and eviction for one run."""

    def __init__(
        self,
        store: Store,
        base: Base | Checkpoint | None,
        *,
        retention: Policy,
        name: str = "main",
    ) -> None:
        check_name(name)
        if "/" in name:
            raise InvalidInputError(f"the name of a timeline has no '/': {name!r}")
        self.retention = retention
        self.name = name
        self._background = Background()
        self.resident: Resident | None = None
        """Set it to the weights that training starts from, on their device, to find changes there;
        a roll-back renews it."""
        self._last_commit: Commit | None = None
        self._store = store
        self._start = base
        self._alive: dict[str, Checkpoint] = {}
        self._foreign: set[str] = set()
        """Ids of roots that this timeline did not commit; it never evicts them."""
        self._root: Checkpoint | None = None
        self._branch = 0
        self._since = 0
        """Nothing that was created by then is this timeline's to remove (ns since 1970)."""
        self._adopt()
        if self._root is None and isinstance(base, Checkpoint):
            self._set_root(base, self._branch)
            self._anchor_root()
        self._next = 1 + max((self._index(c) for c in self._current()), default=-1)

    @property
    def root(self) -> Base | Checkpoint | None:
        """What the current branch started from."""
        return self._root if self._root is not None else self._start

    @property
    def branch(self) -> int:
        """How many roll-backs there were."""
        return self._branch

    @property
    def last_commit(self) -> Commit | None:
        """What the last commit or roll-back did; ``None`` before the first and after a rewind."""
        self.wait()
        return self._last_commit

    def commit(
        self,
        tensors: State | torch.nn.Module,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Save a checkpoint, protect what the policy keeps and evict the rest.

        Its parent is the branch's root. It may be evicted at once, if no rule keeps it.
        """
        facts = _facts(step, metrics, metadata)
        self.wait()
        return self._commit(tensors, self.retention, facts, self._compare(tensors))

    def commit_async(
        self,
        tensors: State | torch.nn.Module,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Future[Checkpoint]:
        """Commit the tensors as they are now, in the background; return the checkpoint to come.

        The caller waits for the commit before, if that still runs, and for one copy of the tensors
        in host memory, which is held until the timeline is closed. The future has its result once
        all is done that :meth:`commit` does.
        """
        facts, policy = _facts(step, metrics, metadata), self.retention
        self.wait()
        compared = self._compare(tensors)
        return self._background.submit(
            tensors, lambda state: self._commit(state, policy, facts, compared)
        )

    def wait(self) -> None:
        """Wait until no commit is under way; raise an error of it that nobody has taken yet."""
        self._background.wait()

    def rollback(
        self, checkpoint: Checkpoint | str, *, into: torch.nn.Module | None = None
    ) -> dict[str, torch.Tensor]:
        """Restore a checkpoint and start a new branch from it.

        The tensors are restored into a module, or returned (an empty dictionary with ``into``).
        Restored and verified first; then the checkpoint becomes the root, what the new branch does
        not need is evicted, the root is encoded so that it needs nothing but the base, and what
        else stays as a change of it.
        """
        self.wait()
        target = self._store.get(checkpoint)
        tensors: dict[str, torch.Tensor] = {}
        if into is None:
            tensors = self._store.load(target)
        else:
            self._store.load_into(into, target)
        if self.resident is not None:
            # The old copy goes before the new one comes: there may be room for one only.
            self.resident = None
            self.resident = Resident(tensors if into is None else into)
        self._set_root(target, self._branch + 1)
        self._next = 1
        before = self._evict(target, self._protect(self.retention))
        # Only now, when what is not needed has gone: another representation takes room.
        self._anchor_root()
        self._rebase_rest()
        after = self._give_up([])
        self._last_commit = replace(
            before,
            checkpoint=self._alive[target.id],
            peak_bytes=max(before.peak_bytes, after.peak_bytes),
            bytes=after.bytes,
        )
        return tensors

    def rewind(self, index: int) -> None:
        """Make the next commit the one of number ``index`` on its branch; later ones are evicted.

        For a run that takes up an earlier position after it was killed: commits that are repeated
        with equal content get their ids again.
        """
        if index < 0:
            raise InvalidInputError(f"a commit's number is 0 or more, not {index}")
        self.wait()
        later = (c for c in self._current() if self._index(c) >= index)
        self._give_up([c for c in later if c.id != self._root_id()])
        self._next = index
        self._last_commit = None

    def kept(self) -> dict[str, tuple[str, ...]]:
        """Return what is alive, by id, with the reasons as of the last commit."""
        done = self.last_commit
        return dict(done.kept) if done else self._decide(self.retention)

    def close(self) -> None:
        """Drop the refs; the checkpoints stay until a gc with a policy, or ``forget``.

        Where a commit in the background has failed, its error is raised and the refs stay.
        """
        self.wait()
        self._background.release()
        for name in self._store.refs():
            if name.startswith(self._ref("")):
                self._store.unpin(name)

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the refs stay: the run may be taken up again.
        if kind is None:
            self.close()
        else:
            self._background.join()

    def _compare(self, tensors: State | torch.nn.Module) -> Compared | None:
        return None if self.resident is None else self.resident.compare(tensors)

    def _commit(
        self,
        tensors: State | torch.nn.Module,
        policy: Policy,
        facts: Mapping[str, Any],
        compared: Compared | None,
    ) -> Checkpoint:
        place = {"name": self.name, "branch": self._branch, "index": self._next}
        # One lock over both, so that no gc comes between a checkpoint and its protection.
        with self._store.protecting("commit"):
            checkpoint = self._store.save(
                tensors,
                parent=self.root,
                step=facts["step"],
                metrics=facts["metrics"],
                metadata={**facts["metadata"], _KEY: place},
                compared=compared,
            )
            self._alive[checkpoint.id] = checkpoint
            kept = self._protect(policy)
        self._last_commit = self._evict(checkpoint, kept)
        # Last, so that a commit that failed gives the same checkpoint when it is repeated.
        self._next += 1
        return checkpoint

    def _set_root(self, checkpoint: Checkpoint, branch: int) -> None:
        with self._store.protecting("rollback"):
            note = {"branch": branch, "since": self._since}
            self._store.pin(checkpoint, self._ref(_ROOT), note=note)
        if checkpoint.id not in self._alive:
            self._foreign.add(checkpoint.id)
        self._root = self._alive[checkpoint.id] = checkpoint
        self._branch = branch

    def _anchor_root(self) -> None:
        if self._root is not None:
            root = self._store.anchor(self._root)
            self._root = self._alive[root.id] = root

    def _rebase_rest(self) -> None:
        """Let what stays, such as the best overall, no longer keep the root before alive."""
        for checkpoint in list(self._alive.values()):
            own = checkpoint.id not in self._foreign | {self._root_id()}
            if own and self._root is not None and checkpoint.base == self._root.base:
                self._alive[checkpoint.id] = self._store.rebase(checkpoint, self._root)

    def _adopt(self) -> None:
        """Take up what an earlier timeline of this name protected, remove what it did not.

        One that was closed is left alone: its checkpoints are older than ``since``.
        """
        log = self._store.log()
        refs, notes = self._store.refs(), self._store.notes()
        mine = [name for name in refs if name.startswith(self._ref(""))]
        newest = max((checkpoint.created for checkpoint in log), default=0)
        self._since = min((notes[name].get("since", 0) for name in mine), default=newest)
        root = self._ref(_ROOT)
        if root in refs:
            self._root = self._store.get(refs[root])
            self._alive[self._root.id] = self._root
            self._branch = int(notes[root].get("branch", 0))
        protected = {refs[name] for name in mine}
        strays = []
        for checkpoint in log:
            named, old = self._is_named(checkpoint), checkpoint.created <= self._since
            if checkpoint.id in protected:
                self._alive[checkpoint.id] = checkpoint
                if not named or (old and checkpoint.id == self._root_id()):
                    self._foreign.add(checkpoint.id)
            elif named and not old:
                strays.append(checkpoint)
        if strays:
            self._give_up(strays)

    def _ref(self, part: str) -> str:
        return f"timelines/{self.name}/{part}"

    def _root_id(self) -> str | None:
        return None if self._root is None else self._root.id

    def _index(self, checkpoint: Checkpoint) -> int:
        on_branch = checkpoint.id not in self._foreign | {self._root_id()}
        return int(_place(checkpoint)["index"]) if on_branch else 0

    def _branch_of(self, checkpoint: Checkpoint) -> int:
        if checkpoint.id == self._root_id():
            return self._branch
        return -1 if checkpoint.id in self._foreign else int(_place(checkpoint)["branch"])

    def _current(self) -> list[Checkpoint]:
        return [c for c in self._alive.values() if self._branch_of(c) == self._branch]

    def _decide(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        alive = sorted(self._alive.values(), key=lambda c: (c.created, c.id))
        candidates = [
            Candidate(
                id=checkpoint.id,
                metrics=checkpoint.metrics,
                stored_bytes=checkpoint.stored_bytes,
                branch=self._branch_of(checkpoint),
                index=self._index(checkpoint),
                pinned="root of the branch" if checkpoint.id == self._root_id() else None,
            )
            for checkpoint in alive
        ]
        decided = policy.decide(candidates)
        return {
            identity: tuple(reason.text for reason in reasons)
            for identity, reasons in decided.items()
        }

    def _protect(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        kept = self._decide(policy)
        notes = self._store.notes()
        for identity, reasons in kept.items():
            name, note = self._ref(identity), {"reasons": list(reasons), "since": self._since}
            if notes.get(name) != note:
                self._store.pin(identity, name, note=note)
        return kept

    def _evict(self, checkpoint: Checkpoint, kept: dict[str, tuple[str, ...]]) -> Commit:
        superfluous = [c for c in self._alive.values() if c.id not in kept]
        dropped = tuple(c.id for c in superfluous if c.id not in self._foreign)
        result = self._give_up(superfluous)
        return Commit(
            checkpoint=checkpoint,
            kept=kept,
            dropped=dropped,
            peak_bytes=result.peak_bytes,
            bytes=result.bytes,
        )

    def _give_up(self, checkpoints: Sequence[Checkpoint]) -> GcResult:
        """Protect checkpoints no longer, and evict those that are this timeline's own."""
        names = self._store.refs()
        for checkpoint in checkpoints:
            if self._ref(checkpoint.id) in names:
                self._store.unpin(self._ref(checkpoint.id))
        result = self._store.evict(c.id for c in checkpoints if c.id not in self._foreign)
        for checkpoint in checkpoints:
            self._alive.pop(checkpoint.id, None)
        return result

    def _is_named(self, checkpoint: Checkpoint) -> bool:
        return _place(checkpoint).get("name") == self.name


def _place(checkpoint: Checkpoint) -> Mapping[str, Any]:
    place = checkpoint.metadata.get(_KEY)
    return place if isinstance(place, Mapping) else {}


def _facts(
    step: int | None, metrics: Mapping[str, float] | None, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    if metadata is not None and _KEY in metadata:
        raise InvalidInputError(f"the key {_KEY!r} of metadata is the timeline's own")
    return snapshot(step=step, metrics=metrics, metadata=metadata)
