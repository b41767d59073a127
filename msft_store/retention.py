"""Retention policies: pure functions that decide which checkpoints are kept, and why.

Policies are combined with ``|`` by one rule. All keep rules are united. Then a budget drops
checkpoints that are not protected, the least valuable first, and raises an error if the protected
ones alone do not fit. Pins, champions, checkpoints named by the algorithm and the very best by a
metric are protected. In a timeline the budget bounds all bytes of the store's directory, and
checkpoints are evicted for it only when a commit needs the room.

Policies are validated before they delete anything. A policy that ranks by a metric that no
checkpoint has would keep nothing, so it is refused.

Example::

    policy = Champions({"arith": "max", "dates": "max"}) | KeepBest("overall") | DiskBudget(10**9)
    check_ranked_metrics(check_policy(policy), [candidate.metrics for candidate in candidates])
    kept = policy.decide(candidates)         # id → reasons
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
    """The facts about a checkpoint that a policy decides on.

    Attributes:
        id: Id of the checkpoint.
        metrics: Its metrics by name, each in its natural unit.
        stored_bytes: Encoded bytes that the checkpoint takes in the store.
        branch: Number of roll-backs before it.
        index: Number of commits before it on its branch, evicted ones included.
        pinned: Reason to keep it whatever the policy decides; ``None`` if it is not pinned.
        step: Training step that it was saved with, or ``None``.
    """

    id: str
    metrics: Mapping[str, float]
    stored_bytes: int = 0
    branch: int = 0
    index: int = 0
    pinned: str | None = None
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A reason to keep a checkpoint.

    Attributes:
        text: The reason in words, for people.
        protected: True if a budget must not drop the checkpoint.
        rank: Order of value among checkpoints of one rule; larger is less valuable.
    """

    text: str
    protected: bool
    rank: int = 0


Kept = dict[str, tuple[Reason, ...]]


class Policy(ABC):
    """Base class of retention policies; subclass it and implement :meth:`keep` to add one.

    Candidates are always ordered from oldest to newest.
    """

    @abstractmethod
    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        """Yield the candidates that this rule keeps, given oldest first, with the reasons.

        A candidate may come more than once.
        """

    @property
    def budget(self) -> int | None:
        """Largest number of bytes that all kept checkpoints may take; ``None`` for no limit."""
        return None

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """Names of the metrics by which this policy ranks checkpoints."""
        return ()

    def __or__(self, other: Policy) -> Policy:
        return Union(parts=(*_split_parts(self), *_split_parts(other)))

    def decide(self, candidates: Sequence[Candidate]) -> Kept:
        """Return the reasons to keep each kept checkpoint by id; the others may be evicted.

        Raises:
            OverBudgetError: The protected checkpoints exceed the budget.
        """
        kept = self.rules(candidates)
        if self.budget is not None:
            kept = _fit_into_budget(kept, candidates, self.budget)
        return kept

    def rules(self, candidates: Sequence[Candidate]) -> Kept:
        """Return the reasons to keep each kept checkpoint by id, without regard to a budget."""
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
    """The union of several policies; ``|`` makes it."""

    parts: tuple[Policy, ...]

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        keepers = [part for part in self.parts if not isinstance(part, DiskBudget)]
        # A budget without keep rules keeps everything that fits.
        for part in keepers or self.parts[:1]:
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
    """Keep the ``n`` newest checkpoints, at least 1."""

    n: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", self.n)

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        for rank, candidate in enumerate(reversed(candidates[-self.n :])):
            yield candidate, Reason(text=f"one of the last {self.n}", protected=False, rank=rank)


@dataclass(frozen=True)
class KeepThese(Policy):
    """Keep the checkpoints that an algorithm names; ids without a checkpoint are ignored."""

    ids: frozenset[str]

    def __post_init__(self) -> None:
        if isinstance(self.ids, str):
            raise InvalidInputError(f"KeepThese takes a collection of ids, not {self.ids!r}")

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        for candidate in candidates:
            if candidate.id in self.ids:
                yield candidate, Reason(text="named by the algorithm", protected=True)


@dataclass(frozen=True)
class KeepBest(Policy):
    """Keep the best checkpoints by a metric, over all branches; the earlier one wins a tie.

    Args:
        metric: Name of the metric; checkpoints without a finite value are not ranked.
        k: Number of checkpoints, at least 1; the very best one is protected.
        mode: ``"max"`` or ``"min"``; by default ``"min"`` for a name that ends in ``loss``.
    """

    metric: str
    k: int = 1
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, str):
            raise InvalidInputError(
                f"k comes before mode: write KeepBest({self.metric!r}, 1, {self.k!r})"
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
            place = f"best {self.metric}" if rank == 0 else f"number {rank + 1} by {self.metric}"
            text = f"{place} ({candidate.metrics[self.metric]:.6g})"
            yield candidate, Reason(text=text, protected=rank == 0, rank=rank)


@dataclass(frozen=True)
class Champions(Policy):
    """Keep the champion of each metric: the first best checkpoint of the current branch.

    Args:
        metrics: Direction of each metric, ``"max"`` or ``"min"``.
    """

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
    """Keep champions whose peak window is open, and the next roll-back target.

    The peak of a champion has passed once ``w`` evaluations brought nothing better. The earliest
    champion whose peak has passed is kept as the next roll-back target. That roll-back makes the
    other passed champions useless, so at most ``w + 1`` checkpoints are kept.

    Args:
        metrics: Direction of each metric, ``"max"`` or ``"min"``.
        w: Length of the window in evaluations, at least 1.
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
    """Limit the bytes that other policies keep; alone, keep the newest checkpoints that fit.

    In a timeline all bytes of the store's directory stay within the budget at every moment,
    including temporary files and the checkpoints of other timelines but not bases. 16 KiB of it are
    reserved for refs and locks. In a gc the stored bytes of the kept checkpoints stay within it.

    Args:
        max_bytes: The budget in bytes, at least 1.
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
    finite = [c for c in candidates if math.isfinite(c.metrics.get(metric, math.nan))]
    return sorted(finite, key=lambda candidate: sign * candidate.metrics[metric])


def _find_champions(
    candidates: Sequence[Candidate], metrics: Mapping[str, Mode]
) -> Iterator[tuple[str, Candidate]]:
    current = _select_current_branch(candidates)
    for metric in sorted(metrics):
        ranked = _rank(current, metric, metrics[metric])
        if ranked:
            yield metric, ranked[0]


def list_evictable(kept: Kept, candidates: Sequence[Candidate]) -> list[str]:
    """Return the ids of the kept checkpoints that are not protected, the least valuable last."""
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
            "raise the budget, or unpin some of them"
        )
    return kept


def _check_count(policy: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise InvalidInputError(f"{policy} takes a whole number from 1 up, not {value!r}")


def _check_metrics(policy: str, metrics: Mapping[str, Mode]) -> None:
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(f"{policy} takes a mapping from metrics to directions")
    for mode in metrics.values():
        _check_mode(mode)


def default_mode(metric: str) -> Mode:
    """Return the direction that is good for a metric, judged by its name."""
    return "min" if metric.endswith("loss") else "max"


def _check_mode(mode: str) -> None:
    if mode not in ("max", "min"):
        raise InvalidInputError(f"the direction of a metric is 'max' or 'min', not {mode!r}")


Metrics = Mapping[str, float]


def check_policy(policy: object) -> Policy:
    """Return the policy; :class:`InvalidInputError` if the object is not a retention policy."""
    if not isinstance(policy, Policy):
        raise InvalidInputError(f"expected a retention policy such as KeepLast(3), not {policy!r}")
    return policy


def check_ranked_metrics(policy: Policy, measured: Sequence[Metrics]) -> None:
    """Refuse a policy that ranks by a metric without a finite value in any checkpoint.

    The :class:`InvalidInputError` names the metric with the nearest name.
    """
    known = {metric for metrics in measured for metric in metrics}
    finite = {m for metrics in measured for m, value in metrics.items() if math.isfinite(value)}
    for metric in policy.ranked_by if measured else ():
        if metric not in known:
            hint = suggest_metric(metric, known)
            raise InvalidInputError(f"no checkpoint has a metric {metric!r}; {hint}")
        if metric not in finite:
            raise InvalidInputError(
                f"no checkpoint has a finite {metric!r}, so none is the best by it; "
                "leave that rule out"
            )


def check_commit(policy: Policy, commit: Candidate, others: Iterable[Metrics]) -> None:
    """Refuse a commit that would be evicted at once because no checkpoint has a ranked metric.

    A commit without metrics passes, and so does one that another rule keeps. If any checkpoint has
    a ranked metric, this commit passes too: metrics may be measured one at a time.
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
    """Return a hint that names the known metric with the nearest name."""
    near = difflib.get_close_matches(metric, sorted(known), n=1, cutoff=0.0)
    return f"the nearest is {near[0]!r}" if near else "they have no metrics"
