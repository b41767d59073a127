"""Decide how a transfer moves a ref that exists in both stores, without I/O.

A ref follows the source if the source knows the checkpoint to which the target's ref points,
because then the source's ref was moved later. Otherwise another writer moved the ref in the target,
and it is left alone.

Example::

    rule.select([(ref, target_ref)])        # the pair, or nothing if both are equal
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from msft_store.errors import ConflictError
from msft_store.objects.refs import LEASES, TIMELINES, Ref

RefPair = tuple[Ref, Ref | None]
"""A ref of the source, and the ref of the same name in the target."""


@dataclass(frozen=True, kw_only=True)
class RefMove:
    """A ref that was created or moved in the target; ``before`` is ``None`` for a new one."""

    name: str
    before: str | None
    after: str


def split_names(names: Iterable[str], *, timelines: bool) -> tuple[list[str], int]:
    """Return the names of the refs to transfer, and the number of timelines that are left out.

    A lease belongs to the place where its follower reads, so it is never transferred.
    """
    names = [name for name in names if not name.startswith(LEASES)]
    if timelines:
        return names, 0
    sent = [name for name in names if not name.startswith(TIMELINES)]
    left = set(names) - set(sent)
    return sent, len({name.removeprefix(TIMELINES).partition("/")[0] for name in left})


@dataclass(frozen=True, kw_only=True)
class RefRule:
    """The rule of one transfer by which refs are moved.

    ``known`` are the ids of the source's checkpoints. ``source`` and ``target`` are addresses for
    messages; ``advice`` is the next step for the user after a conflict.
    """

    known: Collection[str]
    force: bool
    source: str
    target: str
    advice: str

    def select(self, pairs: Iterable[RefPair]) -> list[RefPair]:
        """Return the pairs that have to be written.

        :class:`ConflictError` if another writer moved a ref in the target, unless ``force`` is set.
        """
        moves, conflicts = [], []
        source, target = self.source.rstrip("/"), self.target.rstrip("/")
        for ours, theirs in pairs:
            if theirs is not None and theirs.checkpoint == ours.checkpoint:
                continue
            if theirs is None or self.force or theirs.checkpoint in self.known:
                moves.append((ours, theirs))
            else:
                conflicts.append(
                    f"ref {ours.name!r} points to {theirs.checkpoint[:12]} at {target}, which "
                    f"{source} does not have, and to {ours.checkpoint[:12]} at {source}"
                )
        if conflicts:
            raise ConflictError(f"{'; '.join(conflicts)}. {self.advice}")
        return moves
