"""Room for what a timeline writes: within its budget, at the cost of what its policy can spare.

Invariants: what a policy protects is never given up for room, nor is the newest commit before the
next one is durable; what may go, goes one at a time, the least valuable first, and only after a
write that did not fit.

Example::

    with bounded(store, policy):
        checkpoint = with_room(save, tidy, sacrifice)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from msft_store._util import human
from msft_store.errors import OutOfSpaceError, OverBudgetError, StoreError
from msft_store.maintenance.gc import GcResult
from msft_store.retention import Candidate, Policy
from msft_store.store import Store

_T = TypeVar("_T")
NoRoom = (OutOfSpaceError, OverBudgetError)
"""What is raised where the disk, or a budget, is full."""

_LOCKS = 4 << 10
_SMALL = 16 << 10
"""Of a budget, left free by packs and manifests for refs and locks, without which nothing works."""


def bounded(
    store: Store, policy: Policy, *, refs: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Hold what this thread writes to a policy's budget, if it has one.

    Without ``refs`` room for some of these stays free.
    """
    return store.within(policy.budget, reserve=_LOCKS if refs else _SMALL)


def with_room(
    attempt: Callable[[], _T],
    tidy: Callable[[], GcResult],
    sacrifice: Callable[[], GcResult | None],
) -> _T:
    """Return what ``attempt`` does, repeated after a lack of room as long as room can be made.

    ``tidy`` frees what nobody needs; ``sacrifice`` gives one thing up, or returns ``None`` if there
    is nothing left to be given up.
    """
    taken: int | None = None
    while True:
        try:
            return attempt()
        except NoRoom:
            done = tidy()
            # What an attempt itself left behind is freed as well, which makes no room for the next.
            if not done.freed_bytes or (taken is not None and done.bytes >= taken):
                given = sacrifice()
                if given is None:
                    raise
                done = given
            taken = done.bytes


def lost(
    error: StoreError, policy: Policy, candidates: Sequence[Candidate], commit: Candidate
) -> StoreError:
    """Return the error of a commit without room: with what it would have been, and what stays.

    ``commit`` is not among the candidates.
    """
    after, stays = policy.rules([*candidates, commit]), policy.rules(candidates)
    reasons = ", ".join(reason.text for reason in after.get(commit.id, ()))
    held = [
        f"{c.id[:12]}, {human(c.stored_bytes)} ({', '.join(r.text for r in stays[c.id])})"
        for c in candidates
        if c.id in stays
    ]
    return type(error)(
        f"{error}. The commit is missing that would have been {reasons or 'kept by no rule'}. "
        f"What stays: {'; '.join(held) or 'nothing'}"
    )
