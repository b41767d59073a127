"""Retention policies: pure functions from checkpoints to what is kept, and why.

Composition follows one rule. Keep rules are united; then a budget drops what is not protected,
least valuable first, and raises if what is protected does not fit. Policies are combined with
``|``. Protected are pins, champions, what is named, and the very best by a metric.

In a timeline a budget bounds all bytes of the store's directory, and what may be dropped goes only
when a commit has no room; :meth:`Policy.rules` and ``expendable`` are what it goes by.

Example::

    policy = Champions({"arith": "max", "dates": "max"}) | KeepBest("overall") | DiskBudget(10**9)
    kept = policy.decide(candidates)         # id → reasons

Slips of the pen in retention policies, refused before they delete anything.

A policy that ranks by a metric which nobody measured, or which is nowhere finite, keeps nothing,
and so would give everything up. Invariant: what is refused here has changed nothing.

Example::

    check_policy(KeepBest("overal"))                # is it one at all?
    check_ranked(policy, checkpoints)               # InvalidInputError: the nearest is 'overall'
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from msft_store.errors import InvalidInputError, OverBudgetError

Mode = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a policy sees of a checkpoint."""

    id: str
    metrics: Mapping[str, float]
    stored_bytes: int = 0
    branch: int = 0
    """How many roll-backs came before it."""
    index: int = 0
    """How many commits came before it on its branch, evicted ones included."""
    pinned: str | None = None
    """Why it must stay whatever the policy says."""
    step: int | None = None
    """What it was saved with; ``None`` if with none."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a checkpoint is kept."""

    text: str
    protected: bool
    """Whether a budget may not drop it."""
    rank: int = 0
    """The larger, the less valuable."""


Kept = dict[str, tuple[Reason, ...]]


class Policy(ABC):
    """A retention policy; candidates come oldest first."""

    @abstractmethod
    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        """Yield what this rule keeps."""

    @property
    def budget(self) -> int | None:
        """The bytes that all kept checkpoints may take; ``None``: no limit."""
        return None

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """The metrics that decide what is kept."""
        return ()

    def __or__(self, other: Policy) -> Policy:
        return Union(parts=(*_split_parts(self), *_split_parts(other)))

    def decide(self, candidates: Sequence[Candidate]) -> Kept:
        """Return what is kept, by id, with reasons; what is absent may go.

        :class:`OverBudgetError` if what is protected exceeds the budget.
        """
        kept = self.rules(candidates)
        if self.budget is not None:
            kept = _fit_into_budget(kept, candidates, self.budget)
        return kept

    def rules(self, candidates: Sequence[Candidate]) -> Kept:
        """Return what is kept, by id, with reasons, where no budget is looked at."""
        kept: dict[str, list[Reason]] = {}
        for candidate in candidates:
            if candidate.pinned is not None:
                reason = Reason(text=candidate.pinned, protected=True)
                kept.setdefault(candidate.id, []).append(reason)
        for candidate, reason in self.keep(candidates):
            kept.setdefault(candidate.id, []).append(reason)
        return {identity: tuple(reasons) for identity, reasons in kept.items()}


@dataclass(frozen=True, kw_only=True)
class Union(Policy):
    """Several policies at once."""

    parts: tuple[Policy, ...]

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        keepers = [part for part in self.parts if not isinstance(part, DiskBudget)]
        # A cap alone says nothing about what to keep, so everything stays that fits.
        for part in keepers or [KeepLast(len(candidates) or 1)]:
            yield from part.keep(candidates)

    @property
    def ranked_by(self) -> tuple[str, ...]:
        return tuple(metric for part in self.parts for metric in part.ranked_by)

    @property
    def budget(self) -> int | None:
        limits = [part.budget for part in self.parts if part.budget is not None]
        return min(limits, default=None)


@dataclass(frozen=True)
class KeepLast(Policy):
    """Keep the ``n`` newest."""

    n: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", self.n)

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        for rank, candidate in enumerate(reversed(candidates[-self.n :])):
            yield candidate, Reason(text=f"one of the last {self.n}", protected=False, rank=rank)


@dataclass(frozen=True)
class KeepThese(Policy):
    """Keep certain checkpoints, for algorithms that know what they need; ids that are gone count
    for nothing."""

    ids: frozenset[str]

    def __post_init__(self) -> None:
        if isinstance(self.ids, str):
            raise InvalidInputError(f"KeepThese needs ids, a collection: got {self.ids!r}")

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        for candidate in candidates:
            if candidate.id in self.ids:
                yield candidate, Reason(text="named by the algorithm", protected=True, rank=0)


@dataclass(frozen=True)
class KeepBest(Policy):
    """Keep the ``k`` best by a metric, over all branches; earlier ones win ties.

    Without a ``mode`` small is good for a metric whose name ends in ``loss``, and large for others.
    """

    metric: str
    k: int = 1
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, str):
            raise InvalidInputError(
                f"k comes before mode: KeepBest({self.metric!r}, 1, {self.k!r})"
            )
        _check_count("KeepBest", self.k)
        if self.mode is not None:
            _check_mode(self.mode)

    @property
    def ranked_by(self) -> tuple[str, ...]:
        return (self.metric,)

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        mode = self.mode or default_mode(self.metric)
        for rank, candidate in enumerate(_rank(candidates, self.metric, mode)[: self.k]):
            what = f"best {self.metric}" if rank == 0 else f"number {rank + 1} by {self.metric}"
            text = f"{what} ({candidate.metrics[self.metric]:.6g})"
            yield candidate, Reason(text=text, protected=rank == 0, rank=rank)


@dataclass(frozen=True)
class Champions(Policy):
    """Keep, for each metric, the first best checkpoint of the current branch."""

    metrics: Mapping[str, Mode]

    def __post_init__(self) -> None:
        _check_metrics("Champions", self.metrics)

    @property
    def ranked_by(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        for metric, champion in _find_champions(candidates, self.metrics):
            text = f"champion of {metric} ({champion.metrics[metric]:.6g})"
            yield champion, Reason(text=text, protected=True)


@dataclass(frozen=True)
class PeakWindow(Policy):
    """Keep champions whose peak window is open, and the one that is rolled back to next.

    A champion's peak has passed once ``w`` evaluations brought nothing better. Of those whose peak
    has passed the earliest is kept, for its roll-back is to be decided; the others are superseded
    by that decision. So at most ``w + 1`` checkpoints are kept.
    """

    metrics: Mapping[str, Mode]
    w: int

    def __post_init__(self) -> None:
        _check_count("PeakWindow", self.w)
        _check_metrics("PeakWindow", self.metrics)

    @property
    def ranked_by(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        champions = list(_find_champions(candidates, self.metrics))
        now = max((candidate.index for candidate in _select_current_branch(candidates)), default=0)
        first = min(
            (champion.index for _, champion in champions if now - champion.index >= self.w),
            default=None,
        )
        for metric, champion in champions:
            age = now - champion.index
            if age < self.w:
                state = f"peak window open, {age} of {self.w} evaluations"
            elif champion.index == first:
                state = "peak window passed, its roll-back is next"
            else:
                continue
            text = f"champion of {metric} ({champion.metrics[metric]:.6g}); {state}"
            yield champion, Reason(text=text, protected=True)


@dataclass(frozen=True)
class DiskBudget(Policy):
    """Cap what other policies keep; alone, keep the newest that fit.

    In a timeline all bytes of the store's directory stay within it at every moment, temporary files
    and other timelines' checkpoints included; bases are elsewhere. 16 KiB of it are left to refs
    and locks. In a gc the stored bytes of what is kept stay within it.
    """

    max_bytes: int

    def __post_init__(self) -> None:
        _check_count("DiskBudget", self.max_bytes)

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        yield from KeepLast(len(candidates) or 1).keep(candidates)

    @property
    def budget(self) -> int | None:
        return self.max_bytes


def _split_parts(policy: Policy) -> tuple[Policy, ...]:
    return policy.parts if isinstance(policy, Union) else (policy,)


def _select_current_branch(candidates: Sequence[Candidate]) -> list[Candidate]:
    branch = max((candidate.branch for candidate in candidates), default=0)
    return [candidate for candidate in candidates if candidate.branch == branch]


def _rank(candidates: Sequence[Candidate], metric: str, mode: Mode) -> list[Candidate]:
    sign = -1.0 if mode == "max" else 1.0
    able = [c for c in candidates if math.isfinite(c.metrics.get(metric, math.nan))]
    return sorted(able, key=lambda candidate: sign * candidate.metrics[metric])


def _find_champions(
    candidates: Sequence[Candidate], metrics: Mapping[str, Mode]
) -> Iterator[tuple[str, Candidate]]:
    current = _select_current_branch(candidates)
    for metric in sorted(metrics):
        ranked = _rank(current, metric, metrics[metric])
        if ranked:
            yield metric, ranked[0]


def list_evictable(kept: Kept, candidates: Sequence[Candidate]) -> list[str]:
    """Return the ids of what is kept but not protected, the least valuable last."""
    age = {candidate.id: number for number, candidate in enumerate(reversed(candidates))}
    free = [identity for identity in kept if not any(r.protected for r in kept[identity])]
    return sorted(free, key=lambda identity: (min(r.rank for r in kept[identity]), age[identity]))


def _fit_into_budget(kept: Kept, candidates: Sequence[Candidate], budget: int) -> Kept:
    sizes = {candidate.id: candidate.stored_bytes for candidate in candidates}
    kept, free = dict(kept), list_evictable(kept, candidates)
    total = sum(sizes[identity] for identity in kept)
    while total > budget and free:
        total -= sizes[free[-1]]
        del kept[free.pop()]
    if total > budget:
        raise OverBudgetError(
            f"{len(kept)} protected checkpoints take {total} bytes, "
            f"{total - budget} more than the disk budget of {budget}; "
            "raise the budget or unpin some of them"
        )
    return kept


def _check_count(what: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise InvalidInputError(f"{what} takes a whole number from 1 up, not {value!r}")


def _check_metrics(what: str, metrics: Mapping[str, Mode]) -> None:
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(f"{what} takes a mapping from metrics to directions")
    for mode in metrics.values():
        _check_mode(mode)


def default_mode(metric: str) -> Mode:
    """Return which way is good, as far as a name tells it."""
    return "min" if metric.endswith("loss") else "max"


def _check_mode(mode: str) -> None:
    if mode not in ("max", "min"):
        raise InvalidInputError(f"the direction of a metric is 'max' or 'min', not {mode!r}")


Metrics = Mapping[str, float]


def check_policy(policy: object) -> Policy:
    """Return a retention policy; :class:`InvalidInputError` for anything else."""
    if not isinstance(policy, Policy):
        raise InvalidInputError(f"a retention policy, such as KeepLast(3), not {policy!r}")
    return policy


def check_ranked_metrics(policy: Policy, measured: Sequence[Metrics]) -> None:
    """Refuse a policy that ranks by a metric which none of the checkpoints has as a finite number.

    :class:`InvalidInputError` names the nearest one that there is.
    """
    known = {metric for metrics in measured for metric in metrics}
    finite = {m for metrics in measured for m, value in metrics.items() if math.isfinite(value)}
    for metric in policy.ranked_by:
        if measured and metric not in known:
            raise InvalidInputError(
                f"no checkpoint has a metric {metric!r}; {suggest_metric(metric, known)}"
            )
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
            f"{suggest_metric(metric, set(commit.metrics))}"
        )


def suggest_metric(metric: str, known: set[str]) -> str:
    """Return which metric may have been meant."""
    near = difflib.get_close_matches(metric, sorted(known), n=1, cutoff=0.0)
    return f"the nearest is {near[0]!r}" if near else "they have no metrics"
