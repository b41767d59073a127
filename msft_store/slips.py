"""Slips of the pen in retention policies, refused before they delete anything.

A policy that ranks by a metric which nobody measured, or which is nowhere finite, keeps nothing,
and so would give everything up. Invariant: what is refused here has changed nothing.

Example::

    check_policy(KeepBest("overal"))                # is it one at all?
    check_ranked(policy, checkpoints)               # InvalidInputError: the nearest is 'overall'
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from msft_store.errors import InvalidInputError
from msft_store.retention import Candidate, Policy

Metrics = Mapping[str, float]


def check_policy(policy: object) -> Policy:
    """Return a retention policy; :class:`InvalidInputError` for anything else."""
    if not isinstance(policy, Policy):
        raise InvalidInputError(f"a retention policy, such as KeepLast(3), not {policy!r}")
    return policy


def check_ranked(policy: Policy, measured: Sequence[Metrics]) -> None:
    """Refuse a policy that ranks by a metric which none of the checkpoints has as a finite number.

    :class:`InvalidInputError` names the nearest one that there is.
    """
    known = {metric for metrics in measured for metric in metrics}
    finite = {m for metrics in measured for m, value in metrics.items() if math.isfinite(value)}
    for metric in policy.ranked_by:
        if measured and metric not in known:
            raise InvalidInputError(f"no checkpoint has a metric {metric!r}; {hint(metric, known)}")
        if measured and metric not in finite:
            raise InvalidInputError(
                f"no checkpoint has a finite {metric!r}, so none is the best by it; "
                "leave that rule out"
            )


def check_commit(policy: Policy, commit: Candidate, others: Iterable[Metrics]) -> None:
    """Refuse a commit that nothing would keep, as the policy ranks by nothing that was measured.

    A commit without metrics, one of several metrics that come one at a time, and one that another
    rule keeps are none of these. :class:`InvalidInputError` names the nearest metric.
    """
    known = set(commit.metrics).union(*others)
    if not commit.metrics or not policy.ranked_by or not known.isdisjoint(policy.ranked_by):
        return
    if not policy.decide([commit]):
        metric = policy.ranked_by[0]
        raise InvalidInputError(
            f"the policy would evict every commit: it ranks by {metric!r}, which none has; "
            f"{hint(metric, set(commit.metrics))}"
        )


def hint(metric: str, known: set[str]) -> str:
    """Return which metric may have been meant."""
    near = difflib.get_close_matches(metric, sorted(known), n=1, cutoff=0.0)
    return f"the nearest is {near[0]!r}" if near else "they have no metrics"
