"""A second, naive implementation of retention policies, by counting better candidates.

A policy is given as its parts, which are united.

Example::

    kept((KeepBest("m"), KeepLast(2)), candidates)        # the ids
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msft_store import Candidate, Champions, DiskBudget, KeepBest, KeepLast, PeakWindow, Policy

Parts = tuple[Policy, ...]
Candidates = Sequence[Candidate]


def policy_of(parts: Parts) -> Policy:
    """Return the union of policies."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole | part
    return whole


def metrics_of(parts: Parts) -> set[str]:
    """Return the metrics that a policy ranks by."""
    single = {part.metric for part in parts if isinstance(part, KeepBest)}
    many = [set(part.metrics) for part in parts if isinstance(part, Champions | PeakWindow)]
    return single.union(*many)


def kept(parts: Parts, candidates: Candidates) -> set[str]:
    """Return the ids of the kept checkpoints; budgets are ignored."""
    rules = [part for part in parts if not isinstance(part, DiskBudget)]
    return {
        one.id
        for one in candidates
        if one.pinned or not rules or any(_stays(rule, one, candidates) for rule in rules)
    }


def _stays(rule: Policy, one: Candidate, candidates: Candidates) -> bool:
    position = candidates.index(one)
    if isinstance(rule, KeepLast):
        return len(candidates) - position <= rule.n
    if isinstance(rule, KeepBest):
        better = _better(one, candidates, rule.metric, rule.mode)
        return better is not None and better < rule.k
    newest = [c for c in candidates if c.branch == max(c.branch for c in candidates)]
    if isinstance(rule, Champions):
        return any(_leads(one, newest, metric, mode) for metric, mode in rule.metrics.items())
    assert isinstance(rule, PeakWindow)
    now = max(c.index for c in newest)
    leaders = {
        metric: c
        for metric, mode in rule.metrics.items()
        for c in newest
        if _leads(c, newest, metric, mode)
    }
    passed = [c.index for c in leaders.values() if now - c.index >= rule.w]
    return any(
        c is one and (now - c.index < rule.w or c.index == min(passed)) for c in leaders.values()
    )


def _leads(one: Candidate, candidates: Candidates, metric: str, mode: str) -> bool:
    return one in candidates and _better(one, candidates, metric, mode) == 0


def _better(one: Candidate, candidates: Candidates, metric: str, mode: str) -> int | None:
    """Return the number of better candidates, or ``None`` without a finite value."""

    def value(candidate: Candidate) -> float:
        number = candidate.metrics.get(metric, math.nan)
        return -number if mode == "min" else number

    if not math.isfinite(value(one)):
        return None
    finite = [c for c in candidates if math.isfinite(value(c))]
    position = candidates.index(one)
    return sum(
        value(c) > value(one) or (value(c) == value(one) and candidates.index(c) < position)
        for c in finite
    )
