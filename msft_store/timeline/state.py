"""What a timeline has alive, and where each of these checkpoints stands on its branches.

Pure: it knows of no file. Invariants: the root is alive, on the current branch, and pinned; the
newest is never among what may go before the next one is there.

Example::

    alive = Alive(find(store, "main"))
    policy.rules(alive.candidates())
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msft_store.objects.manifest import Checkpoint
from msft_store.retention import Candidate, Policy, expendable
from msft_store.timeline.persistence import Traces, place_of


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
    left_bytes: int = 0
    """Bytes that nothing needs in packs for whose rewriting there was no room."""
    postponed: str | None = None
    """Why the root, or what else stays, is not yet encoded as a roll-back encodes it: there was no
    room. The next commit or roll-back, or the next timeline of that name, tries again."""


class Alive:
    """The checkpoints that a timeline protects, its root among them."""

    def __init__(self, traces: Traces) -> None:
        self.root = traces.root
        """The checkpoint that the branch started from; ``None`` on one that starts from a base."""
        self.branch = traces.branch
        self.foreign = set(traces.foreign)
        """Ids of roots that the timeline did not commit; it never evicts them."""
        self._by_id = {checkpoint.id: checkpoint for checkpoint in traces.protected}

    def all(self) -> list[Checkpoint]:
        """Return all, oldest first."""
        return sorted(self._by_id.values(), key=lambda c: (c.created, c.id))

    def get(self, identity: str) -> Checkpoint | None:
        """Return one by its id, if it is there."""
        return self._by_id.get(identity)

    def add(self, checkpoint: Checkpoint) -> Checkpoint:
        """Have a checkpoint from here on, or what became of it; return it."""
        self._by_id[checkpoint.id] = checkpoint
        return checkpoint

    def remove(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Have checkpoints no longer."""
        for checkpoint in checkpoints:
            self._by_id.pop(checkpoint.id, None)

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint was committed here, and is not the root."""
        return checkpoint.id not in self.foreign and not self._is_root(checkpoint)

    def index(self, checkpoint: Checkpoint) -> int:
        """Return how many commits came before it on its branch."""
        return int(place_of(checkpoint)["index"]) if self.is_own(checkpoint) else 0

    def on_branch(self) -> list[Checkpoint]:
        """Return those of the current branch, oldest first."""
        return [c for c in self.all() if self._branch_of(c) == self.branch]

    def candidates(self) -> list[Candidate]:
        """Return all as a policy sees them, oldest first."""
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
            for checkpoint in self.all()
        ]

    def kept(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        """Return what the rules of a policy keep, by id, with reasons.

        Its budget is not looked at: it holds for what is written.
        """
        decided = policy.rules(self.candidates())
        return {i: tuple(reason.text for reason in reasons) for i, reasons in decided.items()}

    def superfluous(self, policy: Policy) -> list[Checkpoint]:
        """Return what no rule keeps, but the newest."""
        kept = self.kept(policy)
        return [checkpoint for checkpoint in self.all()[:-1] if checkpoint.id not in kept]

    def expendable(self, policy: Policy) -> list[Checkpoint]:
        """Return what the budget of a policy may drop, but the newest; the least valuable last."""
        candidates = self.candidates()
        dropped = expendable(policy.rules(candidates), candidates)
        older = {checkpoint.id: checkpoint for checkpoint in self.all()[:-1]}
        return [older[i] for i in dropped if i in older] if policy.budget is not None else []

    def _branch_of(self, checkpoint: Checkpoint) -> int:
        if self._is_root(checkpoint):
            return self.branch
        return -1 if checkpoint.id in self.foreign else int(place_of(checkpoint)["branch"])

    def _is_root(self, checkpoint: Checkpoint) -> bool:
        return self.root is not None and checkpoint.id == self.root.id
