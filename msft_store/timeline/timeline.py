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

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch

from msft_store.errors import InvalidInputError
from msft_store.maintenance.gc import GcResult
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.refs import check_name
from msft_store.retention import Candidate, Policy, check_commit, check_policy
from msft_store.saver import Background, State
from msft_store.store import Store
from msft_store.tensors.boxes import Box, Parts
from msft_store.tensors.resident import Compared, Resident
from msft_store.timeline.persistence import KEY, ROOT, facts_of, find, protect, ref_of, release
from msft_store.timeline.room import NoRoom, bounded, lost, with_room
from msft_store.timeline.state import Alive, Commit


class Timeline:
    """Commits, roll-backs and eviction for one run.

    A name has one user at a time: where another process has the timeline open, :class:`BusyError`
    says which. It is free once it is closed there or no longer referred to, or that process has
    ended. Within one process, and in a forked child, it may be opened again.
    """

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
        self._retention = check_policy(retention)
        self.name = name
        self._claim = store.claim("timeline", name)
        self._background = Background()
        self.resident: Resident | None = None
        """Set it to the weights that training starts from, on their device, to find changes there;
        a roll-back renews it."""
        self._last_commit: Commit | None = None
        self._store = store
        self._start = base
        self._closed = False
        self._counted = False
        """Whether the number of the next commit is known, not guessed from what is left."""
        self._postponed: str | None = None
        try:
            self._take_up(base)
        except BaseException:
            self._claim.leave()
            raise

    @property
    def root(self) -> Base | Checkpoint | None:
        """What the current branch started from."""
        return self._start if self._alive.root is None else self._alive.root

    @property
    def retention(self) -> Policy:
        """What is kept; another one holds from the next commit or roll-back on."""
        return self._retention

    @retention.setter
    def retention(self, policy: Policy) -> None:
        self._retention = check_policy(policy)

    @property
    def branch(self) -> int:
        """How many roll-backs there were."""
        return self._alive.branch

    @property
    def last_commit(self) -> Commit | None:
        """What the last commit or roll-back did; ``None`` before the first and after a rewind."""
        self.wait()
        return self._last_commit

    def commit(
        self,
        tensors: State | torch.nn.Module | Parts,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Save a checkpoint, protect what the policy keeps and evict the rest.

        Its parent is the branch's root. It may be evicted at once, if no rule keeps it.
        :class:`InvalidInputError`, before anything is saved, if the policy ranks by metrics alone
        that neither this commit nor any other has.
        """
        facts = facts_of(step, metrics, metadata)
        self._prepare(self.retention, facts)
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
        facts, policy = facts_of(step, metrics, metadata), self.retention
        self._prepare(policy, facts)
        compared = self._compare(tensors)
        return self._background.submit(
            tensors, lambda state: self._commit(state, policy, facts, compared)
        )

    def wait(self) -> None:
        """Wait until no commit is under way; raise an error of it that nobody has taken yet."""
        self._background.wait()

    def rollback(
        self,
        checkpoint: Checkpoint | str,
        *,
        into: State | torch.nn.Module | Sequence[Box] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Restore a checkpoint and start a new branch from it.

        The tensors are restored into those of a module or a mapping, or into boxes of them, or
        returned (an empty dictionary with ``into``).
        Restored and verified first; then the checkpoint becomes the root, what the new branch does
        not need is evicted, the root is encoded so that it needs nothing but the base, and what
        else stays as a change of it.
        """
        self._check_open()
        self.wait()
        target = self._store.get(checkpoint)
        tensors: dict[str, torch.Tensor] = {}
        if into is None:
            tensors = self._store.load(target)
        elif isinstance(into, Sequence):
            self._store.load_boxes(target, into)
        else:
            self._store.load_into(into, target)
        if self.resident is not None and not isinstance(into, Sequence):
            # The old copy goes before the new one comes: there may be room for one only.
            self.resident = None
            self.resident = Resident(tensors if into is None else into)
        policy, before = self.retention, self._alive.all()
        with bounded(self._store, policy):
            begin = partial(self._set_root, target, self.branch + 1)
            with_room(begin, partial(self._give_up, []), lambda: None)
            self._next, self._counted = 1, True
            # Only then, when what is not needed has gone: another representation takes room.
            self._last_commit = self._settle(self._evict(target, self._protect(policy), before))
        return tensors

    def rewind(self, index: int) -> None:
        """Make the next commit the one of number ``index`` on its branch; later ones are evicted.

        For a run that takes up an earlier position after it was killed: commits that are repeated
        with equal content get their ids again. :class:`InvalidInputError` for a number beyond the
        next one; a timeline that was taken up again accepts any, for what it evicted left no trace.
        """
        self._check_open()
        self.wait()
        if index < 0 or (self._counted and index > self._next):
            raise InvalidInputError(
                f"the next commit of branch {self.branch} is number {self._next}; "
                f"it can be one from 0 to that, not {index}"
            )
        alive = self._alive
        later = [c for c in alive.on_branch() if alive.index(c) >= index and alive.is_own(c)]
        with bounded(self._store, self.retention):
            self._give_up(later)
        self._next = index
        self._last_commit = None

    def kept(self) -> dict[str, tuple[str, ...]]:
        """Return what is alive, by id, with the reasons as of the last commit."""
        done = self.last_commit
        return dict(done.kept) if done else self._alive.kept(self.retention)

    def checkpoints(self) -> list[Checkpoint]:
        """Return what is alive, oldest first, to be loaded or rolled back to."""
        self.wait()
        return self._alive.all()

    def close(self) -> None:
        """Drop the refs; the checkpoints stay until a gc with a policy, or ``forget``.

        Where a commit in the background has failed, its error is raised and the refs stay. Later
        commits are refused.
        """
        self.wait()
        self._background.release()
        # Also where this fails: with some of its refs it is no timeline any more.
        self._closed = True
        try:
            release(self._store, self.name)
        finally:
            self._claim.end()

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
            self._claim.leave()

    def _take_up(self, base: Base | Checkpoint | None) -> None:
        """Go on from what an earlier timeline of this name left, or begin."""
        traces = find(self._store, self.name)
        self._since = traces.since
        self._alive = Alive(traces)
        with bounded(self._store, self.retention):
            # What it is given to start from stays, even where a killed one had not protected it.
            given = base.id if isinstance(base, Checkpoint) else None
            strays = [checkpoint for checkpoint in traces.strays if checkpoint.id != given]
            if strays:
                self._give_up(strays)
            if self._alive.root is None:
                self._begin(base)
            else:
                # A roll-back may have been interrupted before it was through.
                self._encode_anew()
        self._next = 1 + max(map(self._alive.index, self._alive.on_branch()), default=-1)

    def _prepare(self, policy: Policy, facts: Mapping[str, Any]) -> None:
        """Wait until a commit may begin; refuse one that would be evicted by a slip of the pen."""
        self._check_open()
        self.wait()
        check_commit(policy, self._candidate(facts), [c.metrics for c in self._alive.all()])

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidInputError(f"timeline {self.name!r} is closed; make a new one")

    def _compare(self, tensors: State | torch.nn.Module | Parts) -> Compared | None:
        if self.resident is None or isinstance(tensors, Parts):
            return None
        return self.resident.compare(tensors)

    def _commit(
        self,
        tensors: State | torch.nn.Module | Parts,
        policy: Policy,
        facts: Mapping[str, Any],
        compared: Compared | None,
    ) -> Checkpoint:
        place = {"name": self.name, "branch": self.branch, "index": self._next}
        metadata = {**facts["metadata"], KEY: place}
        facts, before = {**facts, "metadata": metadata}, self._alive.all()
        save = partial(self._store.save, tensors, parent=self.root, compared=compared, **facts)
        with bounded(self._store, policy):
            try:
                checkpoint, kept = with_room(
                    partial(self._save, save, policy),
                    lambda: self._give_up(self._alive.superfluous(policy)),
                    partial(self._sacrifice, policy),
                )
            except NoRoom as error:
                commit = self._candidate(facts)
                raise lost(error, policy, self._alive.candidates(), commit) from error
            done = self._evict(checkpoint, kept, [*before, checkpoint])
            self._last_commit = self._settle(done) if self._postponed else done
        # Last, so that a commit that failed gives the same checkpoint when it is repeated.
        self._next, self._counted = self._next + 1, True
        return checkpoint

    def _save(
        self, save: Callable[[], Checkpoint], policy: Policy
    ) -> tuple[Checkpoint, dict[str, tuple[str, ...]]]:
        """Save and protect; without room for both, do neither."""
        before = {c.id for c in self._alive.all()}
        try:
            # One lock over both, so that no gc comes between a checkpoint and its protection.
            with self._store.protecting("commit"):
                checkpoint = save()
                self._alive.add(checkpoint)
                return checkpoint, self._protect(policy)
        except NoRoom:
            self._give_up([c for c in self._alive.all() if c.id not in before])
            raise

    def _sacrifice(self, policy: Policy) -> GcResult | None:
        """Give up what the policy values least, if it can spare anything."""
        least = self._alive.expendable(policy)[-1:]
        return self._give_up(least) if least else None

    def _settle(self, done: Commit) -> Commit:
        """Encode anew what a roll-back left to be; return what was done with that."""
        self._encode_anew()
        after = self._give_up([])
        return replace(
            done,
            checkpoint=self._alive.get(done.checkpoint.id) or done.checkpoint,
            peak_bytes=max(done.peak_bytes, after.peak_bytes),
            bytes=after.bytes,
            left_bytes=after.left_bytes,
            postponed=self._postponed,
        )

    def _begin(self, base: Base | Checkpoint | None) -> None:
        if isinstance(base, Checkpoint):
            self._set_root(self._store.get(base), self.branch)
            self._encode_anew()
        elif isinstance(base, Base):
            self._store.base(base)
        elif base is not None:
            raise InvalidInputError(f"a timeline starts from a base or a checkpoint, not {base!r}")

    def _set_root(self, checkpoint: Checkpoint, branch: int) -> None:
        with self._store.protecting("rollback"):
            given = self._alive.foreign | {checkpoint.id} - {c.id for c in self._alive.all()}
            note = self._note(checkpoint.id in given, branch=branch)
            with bounded(self._store, self.retention, refs=True):
                self._store.pin(checkpoint, ref_of(self.name, ROOT), note=note)
        self._alive.add(checkpoint)
        self._alive.foreign = given
        self._alive.root, self._alive.branch = checkpoint, branch

    def _encode_anew(self) -> None:
        """Let the root need nothing but the base, and what else stays not the root before.

        What needs nothing of that any more is left as it is, and so is what there is no room for.
        """
        self._postponed, root = None, self._alive.root
        if root is None:
            return
        try:
            root = self._alive.root = self._alive.add(self._store.anchor(root))
            for checkpoint in self._alive.all():
                if checkpoint.base == root.base and self._alive.is_own(checkpoint):
                    self._alive.add(self._store.rebase(checkpoint, root))
        except NoRoom as error:
            self._postponed = str(error)

    def _candidate(self, facts: Mapping[str, Any]) -> Candidate:
        # The commit to come, as a policy sees it.
        return Candidate(
            id="",
            metrics=facts["metrics"],
            branch=self.branch,
            index=self._next,
            step=facts["step"],
        )

    def _protect(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        # What a failed eviction, or somebody by hand, has removed is no candidate.
        there = {checkpoint.id for checkpoint in self._store.log()}
        self._alive.remove(c for c in self._alive.all() if c.id not in there)
        kept = self._alive.kept(policy)
        with bounded(self._store, policy, refs=True):
            given = self._alive.foreign
            notes = {i: self._note(i in given, reasons=list(kept[i])) for i in kept}
            protect(self._store, self.name, notes)
        return kept

    def _note(self, given: bool, **more: Any) -> dict[str, Any]:
        return {**more, **({"given": True} if given else {}), "since": self._since}

    def _evict(
        self, checkpoint: Checkpoint, kept: dict[str, tuple[str, ...]], before: Sequence[Checkpoint]
    ) -> Commit:
        """Give up what is not kept; what has gone of those ``before`` is told as dropped."""
        result = self._give_up([c for c in self._alive.all() if c.id not in kept])
        there = {c.id for c in self._store.log()}
        dropped = tuple(dict.fromkeys(c.id for c in before if c.id not in there))
        return Commit(
            checkpoint=checkpoint,
            kept=kept,
            dropped=dropped,
            peak_bytes=result.peak_bytes,
            bytes=result.bytes,
            left_bytes=result.left_bytes,
        )

    def _give_up(self, checkpoints: Sequence[Checkpoint]) -> GcResult:
        """Protect checkpoints no longer, and evict those that are this timeline's own."""
        names = self._store.refs()
        for name in (ref_of(self.name, checkpoint.id) for checkpoint in checkpoints):
            if name in names:
                self._store.unpin(name)
        result = self._store.evict(
            c.id for c in checkpoints if c.id not in self._alive.foreign and c.created > self._since
        )
        self._alive.remove(checkpoints)
        return result
