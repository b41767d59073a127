"""Commit checkpoints, roll back and evict under a retention policy: a rollback algorithm's view.

A timeline is a line of commits on branches. The first branch starts from the base. Every roll-back
starts another branch from the checkpoint that it restores, the branch's *root*. The root and the
checkpoints that the policy keeps are protected by refs ``timelines/<name>/…`` while the timeline
lives, so that a gc of another process cannot evict them. Everything else is evicted at once.

Invariants: a new checkpoint is durable and protected before an old one is evicted, and a roll-back
has restored and verified its checkpoint before it evicts any. A timeline that was killed is
recovered under its name; commits that were not protected yet are evicted then. A checkpoint that
the timeline did not commit, but got as its start or as a target of a roll-back, is never evicted
by it.

``commit_async`` is ``commit`` in the background, on a copy of the tensors: it makes the same
checkpoint with the same id, under the policy that was set when it was called. One commit runs at a
time. All other methods and properties first wait for it and raise its error unless the future was
asked for it, except ``root`` and ``branch``, which a commit does not change.

Example::

    timeline = Timeline(store, base, retention=Champions({"arith": "max"}) | KeepBest("overall"))
    ckpt = timeline.commit(model.state_dict(), step=10, metrics={"arith": 0.4, "overall": 0.4})
    future = timeline.commit_async(model, step=20, metrics={"arith": 0.3, "overall": 0.5})
    timeline.rollback(ckpt, into=model)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from msft_store.errors import InvalidInputError
from msft_store.maintenance.gc import GcResult
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint, CheckpointFacts
from msft_store.objects.refs import check_ref_name
from msft_store.remote.versions import Version
from msft_store.retention import Candidate, Policy, check_commit, check_policy
from msft_store.saver import Background, State
from msft_store.store import Store
from msft_store.tensors.boxes import Box, Parts
from msft_store.tensors.files import check_files
from msft_store.tensors.resident import Compared, Resident
from msft_store.timeline.persistence import (
    KEY,
    ROOT,
    check_metadata,
    delete_refs,
    protect,
    read_timeline,
    ref_of,
)
from msft_store.timeline.room import NoRoom, no_room_error, within_budget
from msft_store.timeline.state import Commit, TimelineState

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A commit that was asked for, besides its tensors."""

    policy: Policy
    facts: CheckpointFacts
    compared: Compared | None
    files: Mapping[str, bytes]


class Timeline:
    """Commits, roll-backs and eviction for one run.

    A name has one user at a time. If another process has the timeline open, :class:`BusyError`
    names it. The name is free once that process closes the timeline, drops it or ends. Within one
    process, and in a forked child, a timeline may be opened again.

    Args:
        store: The store that holds the checkpoints.
        base: What the first branch starts from: a base, a checkpoint, or ``None`` for full
            checkpoints. A timeline that is recovered goes on from its own root instead.
        retention: The policy that says which checkpoints stay.
        name: Name of the timeline in the store, without ``/``.

    Attributes:
        resident: Set it to a :class:`Resident` of the weights that training starts from, to find
            changes on their device. A roll-back renews it.
    """

    def __init__(
        self,
        store: Store,
        base: Base | Checkpoint | None,
        *,
        retention: Policy,
        name: str = "main",
    ) -> None:
        check_ref_name(name)
        if "/" in name:
            raise InvalidInputError(f"the name of a timeline has no '/': {name!r}")
        self._retention = check_policy(retention)
        self.name = name
        self._claim = store.claim("timeline", name)
        self._background = Background()
        self.resident: Resident | None = None
        self._last_commit: Commit | None = None
        self._store = store
        self._start = base
        self._closed = False
        self._next_is_exact = False
        """False while the next index is only inferred from the checkpoints that are left."""
        self._postponed: str | None = None
        self._held = 0
        """Bytes that re-encoding could not free at the last commit or roll-back."""
        try:
            self._recover(base)
        except BaseException:
            self._claim.leave()
            raise

    @property
    def root(self) -> Base | Checkpoint | None:
        """The base or checkpoint that the current branch started from."""
        return self._start if self._state.root is None else self._state.root

    @property
    def retention(self) -> Policy:
        """The retention policy; a new one takes effect at the next commit or roll-back."""
        return self._retention

    @retention.setter
    def retention(self, policy: Policy) -> None:
        self._retention = check_policy(policy)

    @property
    def branch(self) -> int:
        """The number of roll-backs so far."""
        return self._state.branch

    @property
    def last_commit(self) -> Commit | None:
        """The result of the last commit or roll-back; ``None`` before the first, after a rewind."""
        self.wait()
        return self._last_commit

    def commit(
        self,
        tensors: State | torch.nn.Module | Parts,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Checkpoint:
        """Save a checkpoint, protect the checkpoints that the policy keeps and evict the rest.

        The parent of the checkpoint is the branch's root. The checkpoint itself is evicted at once
        if no rule keeps it.

        Args:
            tensors: A module, a mapping of names to tensors, or the parts that several processes
                encoded.
            step: Optimizer step, from 0 up.
            metrics: Values by name, in their natural units.
            metadata: Any JSON object without the key ``timeline``.
            files: The model's configuration and tokenizer, as for :meth:`Store.save`.

        Returns:
            The new checkpoint, or the existing one of equal content and facts.

        Raises:
            InvalidInputError: A value cannot be stored, the timeline is closed, or the policy ranks
                by metrics alone that neither this commit nor any other has. Nothing was saved.
            OutOfSpaceError: The disk is full even after eviction.
            OverBudgetError: The policy's budget is too small even after eviction.
        """
        return self._commit(tensors, self._begin_commit(tensors, step, metrics, metadata, files))

    def commit_async(
        self,
        tensors: State | torch.nn.Module,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Future[Checkpoint]:
        """Commit the tensors as they are now, in the background; the arguments are as for a commit.

        The caller waits for the previous commit, if that still runs, and for one copy of the
        tensors to host memory. The timeline holds that memory until it is closed.

        Returns:
            A future of the checkpoint. It has its result once everything that :meth:`commit` does
            is done.

        Raises:
            InvalidInputError: As for :meth:`commit`, at once.
            StoreError: The error of the previous commit, if its future was not asked for it.
        """
        request = self._begin_commit(tensors, step, metrics, metadata, files)
        return self._background.submit(tensors, lambda state: self._commit(state, request))

    def publish(
        self,
        model: State | torch.nn.Module | Parts | Checkpoint | str,
        *,
        name: str,
        step: int,
        to: Any,
        **options: Any,
    ) -> Version:
        """Send weights or a commit to a place where a :class:`Follower` gets them.

        It waits for a commit in the background and is then :meth:`Store.publish`, with the same
        arguments. The versions are pinned apart from the timeline's checkpoints, so a commit that
        is published stays as a version after the timeline has dropped it.

        Raises:
            InvalidInputError: The timeline is closed, or as for :meth:`Store.publish`.
            StoreError: As for :meth:`Store.publish`.
        """
        self._check_open()
        self.wait()
        return self._store.publish(model, name=name, step=step, to=to, **options)

    def wait(self) -> None:
        """Wait until no commit is running, and raise its error if no caller has received it."""
        self._background.wait()

    def rollback(
        self,
        checkpoint: Checkpoint | str,
        *,
        into: State | torch.nn.Module | Sequence[Box] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Restore a checkpoint and start a new branch from it.

        The checkpoint is restored and verified first. Then it becomes the root, the checkpoints
        that the new branch does not need are evicted, and the others are re-encoded: the root
        against the base alone, all others as changes of the root. If the disk has no room for
        that, the next commit tries it again.

        Args:
            checkpoint: A checkpoint, its id, a unique prefix of its id, or the name of a ref.
            into: A module, a mapping of tensors, or boxes of tensors to restore into, in place.

        Returns:
            The restored tensors by name; an empty dictionary if ``into`` is given.

        Raises:
            UnknownCheckpointError: The store has no such checkpoint.
            MismatchError: ``into`` has other names, shapes or dtypes. Nothing was changed.
            CorruptedError: The checkpoint cannot be restored exactly. The branch stays.
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
            # Drop the old copy first, because the device may have room for one copy only.
            self.resident = None
            self.resident = Resident(tensors if into is None else into)
        policy, before = self.retention, self._state.checkpoints()
        with within_budget(self._store, policy):
            with self._store.session("rollback", exclusive=True):
                self._set_root_with_room(target)
                self._next, self._next_is_exact = 1, True
                done = self._evict_unkept(target, self._protect(policy), before)
            # Re-encoding takes room, so it comes after the eviction.
            done = self._reencode_and_evict(done)
            self._last_commit, self._held = done, done.held_bytes
        _LOG.info(
            "timeline %s: rolled back to %s, branch %d", self.name, target.id[:12], self.branch
        )
        return tensors

    def rewind(self, index: int) -> None:
        """Make the next commit number ``index``, from 0 up, of its branch; evict the later ones.

        A run that goes on from an earlier position after a kill calls this: commits that are
        repeated with equal content get their earlier ids.

        Raises:
            InvalidInputError: The number is beyond the next one. A recovered timeline accepts any
                number, because it cannot know how many commits were evicted.
        """
        self._check_open()
        self.wait()
        if index < 0 or (self._next_is_exact and index > self._next):
            raise InvalidInputError(
                f"the next commit of branch {self.branch} is number {self._next}; "
                f"it can be one from 0 to that, not {index}"
            )
        state = self._state
        later = [c for c in state.on_branch() if state.index(c) >= index and state.is_own(c)]
        with within_budget(self._store, self.retention):
            self._evict(later)
        self._next = index
        self._last_commit = None

    def kept(self) -> dict[str, tuple[str, ...]]:
        """Return the ids of all protected checkpoints with the reasons at the last commit."""
        done = self.last_commit
        return dict(done.kept) if done else self._state.kept(self.retention)

    def checkpoints(self) -> list[Checkpoint]:
        """Return all protected checkpoints, oldest first, to load or to roll back to."""
        self.wait()
        return self._state.checkpoints()

    def close(self) -> None:
        """Delete the refs; the checkpoints stay until a gc with a policy, or ``forget``.

        If a commit in the background failed, its error is raised and the refs stay. Later commits
        are refused.
        """
        self.wait()
        self._background.release()
        # Set even if deleting fails, because a timeline with a part of its refs is not usable.
        self._closed = True
        try:
            delete_refs(self._store, self.name)
        finally:
            self._claim.end()

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the refs stay, so that the run can be resumed.
        if kind is None:
            self.close()
        else:
            self._background.join()
            self._claim.leave()

    def _recover(self, base: Base | Checkpoint | None) -> None:
        """Go on from the refs of an earlier timeline of this name, or begin a new one."""
        found = read_timeline(self._store, self.name)
        self._since = found.since
        self._state = TimelineState(found)
        with within_budget(self._store, self.retention):
            # The given start stays, even if the killed timeline had not protected it yet.
            given = base.id if isinstance(base, Checkpoint) else None
            unprotected = [c for c in found.unprotected if c.id != given]
            if unprotected:
                _LOG.info(
                    "timeline %s was killed: evict %d unprotected commits",
                    self.name,
                    len(unprotected),
                )
                self._evict(unprotected)
            if self._state.root is None:
                self._begin(base)
            else:
                _LOG.info(
                    "timeline %s: recovered branch %d with %d checkpoints",
                    self.name,
                    self.branch,
                    len(self._state.checkpoints()),
                )
                # The kill may have interrupted a roll-back before it re-encoded the root.
                self._reencode()
        self._next = 1 + max(map(self._state.index, self._state.on_branch()), default=-1)

    def _begin(self, base: Base | Checkpoint | None) -> None:
        if isinstance(base, Checkpoint):
            with self._store.session("rollback"):
                self._set_root(self._store.get(base), self.branch)
                self._reencode()
        elif isinstance(base, Base):
            self._store.base(base)
        elif base is not None:
            raise InvalidInputError(f"a timeline starts from a base or a checkpoint, not {base!r}")

    def _begin_commit(
        self,
        tensors: State | torch.nn.Module | Parts,
        step: int | None,
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, Any] | None,
        files: Mapping[str, bytes] | None,
    ) -> _Request:
        """Wait until a commit may begin; refuse one that the policy cannot judge."""
        policy, checked = self.retention, check_files(files)
        check_metadata(metadata)
        facts = CheckpointFacts.of(step=step, metrics=metrics, metadata=metadata)
        self._check_open()
        self.wait()
        known = [checkpoint.metrics for checkpoint in self._state.checkpoints()]
        check_commit(policy, self._candidate(facts), known)
        compared = self._compare(tensors)
        return _Request(policy=policy, facts=facts, compared=compared, files=checked)

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
        request: _Request,
    ) -> Checkpoint:
        policy = request.policy
        before = self._state.checkpoints()
        used: int | None = None
        with within_budget(self._store, policy):
            while True:
                try:
                    checkpoint, kept = self._save_and_protect(tensors, request)
                    break
                except NoRoom as error:
                    used = self._make_room(policy, used)
                    if used is None:
                        raise no_room_error(
                            error,
                            policy,
                            self._state.candidates(),
                            self._candidate(request.facts),
                        ) from error
            with self._store.session("gc", exclusive=True):
                done = self._evict_unkept(checkpoint, kept, [*before, checkpoint])
                if done.held_bytes > self._held and not self._postponed:
                    done = self._release(done)
            if self._postponed:
                done = self._reencode_and_evict(done)
            self._last_commit, self._held = done, done.held_bytes
        # The counter moves last, so that a failed commit gives the same id when it is repeated.
        self._next, self._next_is_exact = self._next + 1, True
        return checkpoint

    def _save_and_protect(
        self,
        tensors: State | torch.nn.Module | Parts,
        request: _Request,
    ) -> tuple[Checkpoint, dict[str, tuple[str, ...]]]:
        """Save and protect a checkpoint; if there is no room for both, undo both."""
        facts = request.facts
        place = {"name": self.name, "branch": self.branch, "index": self._next}
        before = {checkpoint.id for checkpoint in self._state.checkpoints()}
        try:
            # One lock for both, so that no gc runs between the save and the protection.
            with self._store.session("commit"):
                checkpoint = self._store.save(
                    tensors,
                    parent=self.root,
                    references=self._references(request.policy, facts),
                    step=facts.step,
                    metrics=facts.metrics,
                    metadata={**facts.metadata, KEY: place},
                    compared=request.compared,
                    files=request.files,
                )
                self._state.add(checkpoint)
                return checkpoint, self._protect(request.policy)
        except NoRoom:
            self._evict([c for c in self._state.checkpoints() if c.id not in before])
            raise

    def _references(self, policy: Policy, facts: CheckpointFacts) -> list[Checkpoint]:
        """Return the nearest checkpoint of the branch that stays after a commit, if any."""
        stays = policy.rules([*self._state.candidates(), self._candidate(facts)])
        there = [checkpoint for checkpoint in self._state.on_branch() if checkpoint.id in stays]
        near = self._store.nearest(there, position=self._next)
        return [] if near is None else [near]

    def _make_room(self, policy: Policy, used: int | None) -> int | None:
        """Evict checkpoints that no rule keeps; if that does not help, the least valuable one.

        ``used`` is the result of the previous call. Return the bytes of the store now, or ``None``
        if nothing can be evicted.
        """
        done = self._evict(self._state.not_kept(policy))
        # The failed attempt's own files are freed as well, which makes no room for the next one.
        if done.freed_bytes and (used is None or done.bytes < used):
            return done.bytes
        least = self._state.evictable(policy)[-1:]
        return self._evict(least).bytes if least else None

    def _set_root_with_room(self, target: Checkpoint) -> None:
        """Make a checkpoint the root of a new branch; free dead bytes while there is no room."""
        used: int | None = None
        while True:
            try:
                self._set_root(target, self.branch + 1)
                return
            except NoRoom:
                done = self._evict([])
                if not done.freed_bytes or (used is not None and done.bytes >= used):
                    raise
                used = done.bytes

    def _set_root(self, checkpoint: Checkpoint, branch: int) -> None:
        own = {c.id for c in self._state.checkpoints()}
        foreign = self._state.foreign | {checkpoint.id} - own
        note = self._note(checkpoint.id in foreign, branch=branch)
        with within_budget(self._store, self.retention, refs=True):
            self._store.pin(checkpoint, ref_of(self.name, ROOT), note=note)
        self._state.add(checkpoint)
        self._state.foreign = foreign
        self._state.root, self._state.branch = checkpoint, branch

    def _reencode(self) -> None:
        """Re-encode the root against the base alone, the other checkpoints against the root.

        The bytes of the old root can be freed then. If there is no room, the next commit tries
        again.
        """
        self._postponed, root = None, self._state.root
        if root is None:
            return
        others = [c for c in self._state.checkpoints() if self._state.is_own(c)]
        with self._store.session("reencode"):
            try:
                self._store.reencode(root, others)
            except NoRoom as error:
                self._postponed = str(error)
                _LOG.info("timeline %s: re-encoding is postponed: %s", self.name, error)
            self._state.update(self._store.log())

    def _reencode_and_evict(self, done: Commit) -> Commit:
        """Re-encode after a roll-back, free what is dead then, and return the updated result."""
        self._reencode()
        with self._store.session("gc", exclusive=True):
            done = replace(self._updated(done, self._evict([])), postponed=self._postponed)
            return self._release(done) if done.held_bytes else done

    def _release(self, done: Commit) -> Commit:
        """Free the bytes of evicted checkpoints that others are differences of."""
        try:
            result = self._store.release(self._state.checkpoints())
        except NoRoom as error:
            _LOG.info("timeline %s: %d bytes stay: %s", self.name, done.held_bytes, error)
            result = self._evict([])
        return self._updated(done, result)

    def _updated(self, done: Commit, after: GcResult) -> Commit:
        """Return the result of a commit or roll-back with that of what was done after it."""
        self._state.update(self._store.log())
        return replace(
            done,
            checkpoint=self._state.get(done.checkpoint.id) or done.checkpoint,
            peak_bytes=max(done.peak_bytes, after.peak_bytes),
            bytes=after.bytes,
            left_bytes=after.left_bytes,
            held_bytes=after.held_bytes,
        )

    def _candidate(self, facts: CheckpointFacts) -> Candidate:
        """Return the next commit as a policy sees it."""
        return Candidate(
            id="",
            metrics=facts.metrics,
            branch=self.branch,
            index=self._next,
            step=facts.step,
        )

    def _protect(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        """Pin the checkpoints that the policy keeps; return their ids with reasons."""
        # An eviction that failed half-way, or a user, may have removed checkpoints.
        self._state.update(self._store.log())
        kept = self._state.kept(policy)
        with within_budget(self._store, policy, refs=True):
            foreign = self._state.foreign
            notes = {i: self._note(i in foreign, reasons=list(kept[i])) for i in kept}
            protect(self._store, self.name, notes)
        return kept

    def _note(self, given: bool, **more: Any) -> dict[str, Any]:
        return {**more, **({"given": True} if given else {}), "since": self._since}

    def _evict_unkept(
        self, checkpoint: Checkpoint, kept: dict[str, tuple[str, ...]], before: Sequence[Checkpoint]
    ) -> Commit:
        """Evict all but ``kept``; the result lists those of ``before`` that are gone as dropped."""
        result = self._evict([c for c in self._state.checkpoints() if c.id not in kept])
        there = {c.id for c in self._store.log()}
        dropped = tuple(dict.fromkeys(c.id for c in before if c.id not in there))
        return Commit(
            checkpoint=checkpoint,
            kept=kept,
            dropped=dropped,
            peak_bytes=result.peak_bytes,
            bytes=result.bytes,
            left_bytes=result.left_bytes,
            held_bytes=result.held_bytes,
        )

    def _evict(self, checkpoints: Sequence[Checkpoint]) -> GcResult:
        """Unpin checkpoints, and evict those that this timeline committed."""
        with self._store.session("gc", exclusive=True):
            names = self._store.refs()
            for name in (ref_of(self.name, checkpoint.id) for checkpoint in checkpoints):
                if name in names:
                    self._store.unpin(name)
            result = self._store.evict(
                c.id
                for c in checkpoints
                if c.id not in self._state.foreign and c.created > self._since
            )
        self._state.remove(checkpoints)
        return result
