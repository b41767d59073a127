"""Keep the writes of a timeline within its policy's disk budget.

Invariants: checkpoints that the policy protects are never evicted to make room, and the newest
commit is never evicted before the next one is durable. Checkpoints go one at a time, the least
valuable first, and only after a write that did not fit.

Example::

    with within_budget(store, policy):
        checkpoint = store.save(state)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from msft_store._util import format_bytes
from msft_store.errors import OutOfSpaceError, OverBudgetError, StoreError
from msft_store.retention import Candidate, Policy
from msft_store.store import Store

NoRoom = (OutOfSpaceError, OverBudgetError)
"""The errors of a full disk and of a full budget."""

_LOCKS = 4 << 10
_SMALL = 16 << 10
"""Bytes of a budget that packs and manifests leave free for refs and locks."""


def within_budget(
    store: Store, policy: Policy, *, refs: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Hold this thread's writes to the budget of a policy, if it has one.

    Without ``refs``, room for some refs stays free.
    """
    return store.within(policy.budget, reserve=_LOCKS if refs else _SMALL)


def no_room_error(
    error: StoreError, policy: Policy, candidates: Sequence[Candidate], commit: Candidate
) -> StoreError:
    """Return the error of a commit without room.

    It says which rules would have kept the commit, and which checkpoints take the room.
    ``commit`` is not among the candidates.
    """
    after, stays = policy.rules([*candidates, commit]), policy.rules(candidates)
    reasons = ", ".join(reason.text for reason in after.get(commit.id, ()))
    kept = [
        f"{c.id[:12]}, {format_bytes(c.stored_bytes)} ({', '.join(r.text for r in stays[c.id])})"
        for c in candidates
        if c.id in stays
    ]
    return type(error)(
        f"{error}. The commit that was not saved would have been {reasons or 'kept by no rule'}. "
        f"The checkpoints that stay: {'; '.join(kept) or 'none'}"
    )
