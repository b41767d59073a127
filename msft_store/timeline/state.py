"""The checkpoints that a timeline protects, and the place of each on its branches.

Pure: it does no I/O. Invariants: the root is protected, on the current branch and pinned; the
newest checkpoint is never among those to evict, because the next one is not durable yet.

Example::

    state = TimelineState(read_timeline(store, "main"))
    policy.rules(state.candidates())
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msft_store.objects.manifest import Checkpoint
from msft_store.retention import Candidate, Policy, list_evictable
from msft_store.timeline.persistence import PersistedTimeline, place_of


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The result of a commit or a roll-back.

    Attributes:
        checkpoint: The checkpoint that was committed or restored.
        kept: Ids of the checkpoints that stay, with the policy's reasons.
        dropped: Ids of the checkpoints that were evicted.
        peak_bytes: Bytes of the whole store at the worst moment, temporary files included.
        bytes: Bytes of the whole store after eviction.
        left_bytes: Dead bytes in packs that could not be rewritten because there was no room.
        held_bytes: Bytes of evicted checkpoints that stay because others are differences of them.
        postponed: The reason why a roll-back's re-encoding is not done yet: there was no room. The
            next commit, roll-back or timeline of that name tries again. ``None`` if it is done.
    """

    checkpoint: Checkpoint
    kept: Mapping[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    peak_bytes: int
    bytes: int
    left_bytes: int = 0
    held_bytes: int = 0
    postponed: str | None = None


class TimelineState:
    """The checkpoints that a timeline protects, its root among them."""

    def __init__(self, found: PersistedTimeline) -> None:
        self.root = found.root
        """The checkpoint that the branch started from; ``None`` if it started from a base."""
        self.branch = found.branch
        self.foreign = set(found.foreign)
        """Ids of roots that the timeline did not commit and never evicts."""
        self._by_id = {checkpoint.id: checkpoint for checkpoint in found.protected}

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first."""
        return sorted(self._by_id.values(), key=lambda c: (c.created, c.id))

    def get(self, identity: str) -> Checkpoint | None:
        """Return the checkpoint of an id, or ``None``."""
        return self._by_id.get(identity)

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint."""
        self._by_id[checkpoint.id] = checkpoint

    def remove(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Remove checkpoints."""
        for checkpoint in checkpoints:
            self._by_id.pop(checkpoint.id, None)

    def update(self, log: Iterable[Checkpoint]) -> None:
        """Take over the checkpoints as the store has them; remove those that it lacks."""
        self._by_id = {c.id: c for c in log if c.id in self._by_id}
        if self.root is not None:
            self.root = self._by_id.get(self.root.id, self.root)

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Return whether the timeline committed a checkpoint that is not the root."""
        return checkpoint.id not in self.foreign and not self._is_root(checkpoint)

    def index(self, checkpoint: Checkpoint) -> int:
        """Return the number of commits before a checkpoint on its branch."""
        return int(place_of(checkpoint)["index"]) if self.is_own(checkpoint) else 0

    def on_branch(self) -> list[Checkpoint]:
        """Return the checkpoints of the current branch, oldest first."""
        return [c for c in self.checkpoints() if self._branch_of(c) == self.branch]

    def candidates(self) -> list[Candidate]:
        """Return all checkpoints as a policy sees them, oldest first."""
        return [
            Candidate(
                id=checkpoint.id,
                metrics=checkpoint.metrics,
                stored_bytes=checkpoint.stored_bytes,
                branch=self._branch_of(checkpoint),
                index=self.index(checkpoint),
                pinned="root of the branch" if self._is_root(checkpoint) else None,
                step=checkpoint.step,
            )
            for checkpoint in self.checkpoints()
        ]

    def kept(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        """Return the ids that the rules of a policy keep, with reasons.

        The policy's budget does not count here, because it limits writes.
        """
        decided = policy.rules(self.candidates())
        return {i: tuple(reason.text for reason in reasons) for i, reasons in decided.items()}

    def not_kept(self, policy: Policy) -> list[Checkpoint]:
        """Return the checkpoints that no rule keeps, without the newest."""
        kept = self.kept(policy)
        return [checkpoint for checkpoint in self.checkpoints()[:-1] if checkpoint.id not in kept]

    def evictable(self, policy: Policy) -> list[Checkpoint]:
        """Return what the policy's budget may drop, the least valuable last, without the newest."""
        candidates = self.candidates()
        dropped = list_evictable(policy.rules(candidates), candidates)
        older = {checkpoint.id: checkpoint for checkpoint in self.checkpoints()[:-1]}
        return [older[i] for i in dropped if i in older] if policy.budget is not None else []

    def _branch_of(self, checkpoint: Checkpoint) -> int:
        if self._is_root(checkpoint):
            return self.branch
        return -1 if checkpoint.id in self.foreign else int(place_of(checkpoint)["branch"])

    def _is_root(self, checkpoint: Checkpoint) -> bool:
        return self.root is not None and checkpoint.id == self.root.id
