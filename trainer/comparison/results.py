"""What the runs of a comparison come to: means over seeds, differences to SFT, work.

Runs are grouped by budget; those at MSFT's FLOPs make a group of their own, in which MSFT's
ordinary runs stand beside them.

Example::

    comparison = collect(cases, outcomes)
    row = comparison.groups[0].row("msft")
    row.score(OVERALL), comparison.groups[0].difference(row)

Means over seeds with their standard errors: pure functions on numbers.

Example::

    estimate([0.61, 0.63, 0.62])                # mean 0.62, error 0.0058, count 3
    paired({0: 0.63, 1: 0.64}, {0: 0.61, 1: 0.63})      # mean 0.015, error 0.005, count 2
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from trainer.comparison.grid import REFERENCE, Case
from trainer.config.schema import OVERALL
from trainer.report.flops import Account, Work
from trainer.report.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, and how far it may be off."""

    mean: float
    error: float | None
    """Standard error of the mean, from the sample variance; ``None`` for a single value."""
    count: int
    """Values, at least 1."""


def estimate(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard error, or ``None`` of nothing; one NaN makes both NaN."""
    numbers = list(values)
    if not numbers:
        return None
    count = len(numbers)
    mean = _mean(numbers)
    error = None
    if count > 1:
        variance = math.fsum((x - mean) ** 2 for x in numbers) / (count - 1)
        error = math.sqrt(variance / count)
    return Estimate(mean=mean, error=error, count=count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference ``ours - theirs`` over the seeds that both have.

    Its error is that of the differences: what a seed does to both alike is not in it.
    """
    return estimate(ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs)))


def spread(values: Iterable[float]) -> float:
    """Return the standard deviation over all of a mixture's sub-datasets (divided by n).

    They are the whole mixture and not a sample of one; ``values`` must not be empty.
    """
    numbers = list(values)
    mean = _mean(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers))


def _mean(numbers: list[float]) -> float:
    """Return a mean that lies between the least and the greatest number, rounding or not."""
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return min(max(math.fsum(numbers) / len(numbers), min(numbers)), max(numbers))


BASELINE = "sft"
"""The method that differences are taken to."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one run."""

    budget: float
    """The C that it had."""
    summary: Summary | None
    """``None`` where it did not finish."""
    failure: str = ""
    """Why it did not, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at a budget, over seeds."""

    method: str
    label: str
    outcomes: Mapping[int, Outcome]
    """By seed."""
    split: Literal["test", "validation"]
    """Which examples its scores are of."""

    @property
    def runs(self) -> dict[int, Summary]:
        """The finished runs, by seed."""
        return {s: o.summary for s, o in self.outcomes.items() if o.summary is not None}

    def values(self, name: str) -> dict[int, float]:
        """Return the metric of a sub-dataset, or of the mixture (``OVERALL``), by seed."""
        found = {}
        for seed, summary in self.runs.items():
            scores = summary.overall if name == OVERALL else summary.scores[name]
            value = scores.test if self.split == "test" else scores.validation
            if value is not None:
                found[seed] = value
        return found

    def score(self, name: str) -> Estimate | None:
        """Return the metric of a sub-dataset, or of the mixture, over seeds."""
        return estimate(self.values(name).values())

    def spread(self) -> Estimate | None:
        """Return the standard deviation across sub-datasets, over seeds."""
        names = sorted({name for summary in self.runs.values() for name in summary.scores})
        by_name = [self.values(name) for name in names]
        shared = [seed for seed in self.runs if names and all(seed in v for v in by_name)]
        return estimate(spread([values[seed] for values in by_name]) for seed in shared)

    def work(self) -> dict[str, Work]:
        """Return the mean work of a run by the rows of its account, and their ``total``."""
        accounts = [summary.account for summary in self.runs.values()]
        if not accounts:
            return {}
        rows = {row: [getattr(account, row) for account in accounts] for row in _ROWS}
        rows["total"] = [total(account) for account in accounts]
        return {name: _mean_work(works) for name, works in rows.items()}

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Return the mean of what is known, ``None`` where nothing is."""
        found = estimate(value for value in values if value is not None)
        return None if found is None else found.mean

    def budget(self) -> float | None:
        """Return the mean C of the finished runs."""
        return self.mean([o.budget for o in self.outcomes.values() if o.summary is not None])

    def seconds(self) -> float | None:
        """Return the mean time that a run spent in training, evaluation and commits."""
        return self.mean([summary.seconds for summary in self.runs.values()])

    def disk(self) -> float | None:
        """Return the mean peak disk overhead, in full checkpoints."""
        return self.mean([s.disk.peak if s.disk else None for s in self.runs.values()])


@dataclass(frozen=True, kw_only=True)
class Group:
    """All methods at one budget."""

    budget: float
    equal: bool
    """Whether all but MSFT were given C such that they take MSFT's FLOPs."""
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        """What stands above its table."""
        return f"C = {self.budget:g}" + (", all at MSFT's FLOPs" if self.equal else "")

    def row(self, method: str) -> Row | None:
        """Return the row of a method, if it is there."""
        return next((row for row in self.rows if row.method == method), None)

    def difference(self, row: Row) -> Estimate | None:
        """Return the overall metric's difference to SFT in this group, paired by seed."""
        sft = self.row(BASELINE)
        if sft is None or row.method == BASELINE:
            return None
        return paired(row.values(OVERALL), sft.values(OVERALL))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison."""

    groups: Sequence[Group]
    outcomes: Mapping[Case, Outcome]

    @property
    def first(self) -> Summary | None:
        """Any finished run: metric, direction and sub-datasets are the same in all."""
        return next((o.summary for o in self.outcomes.values() if o.summary is not None), None)

    @property
    def failures(self) -> dict[Case, str]:
        """The runs that did not finish, and why."""
        return {case: o.failure for case, o in self.outcomes.items() if o.summary is None}

    @property
    def diverged(self) -> list[Case]:
        """The runs that training's divergence ended; their best before it counts."""
        return [c for c, o in self.outcomes.items() if o.summary is not None and o.summary.diverged]

    @property
    def seeds(self) -> list[int]:
        """The seeds, each once."""
        return sorted({case.seed for case in self.outcomes})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a number that is not finite becomes ``None``."""
        first = self.first
        tree: dict[str, Any] = {
            "metric": first.metric if first else None,
            "mode": first.mode if first else None,
            "seeds": self.seeds,
            "groups": [_group_tree(group) for group in self.groups],
            "runs": {
                str(case.path): {
                    "method": case.method,
                    "budget": case.budget,
                    "equal": case.equal,
                    "seed": case.seed,
                    "compute_budget": outcome.budget,
                    "failure": outcome.failure or None,
                    "diverged": case in self.diverged,
                    "flops": total(outcome.summary.account).flops if outcome.summary else None,
                }
                for case, outcome in self.outcomes.items()
            },
        }
        finite: dict[str, Any] = _finite(tree)
        return finite


def collect(outcomes: Mapping[Case, Outcome]) -> Comparison:
    """Group the outcomes of all runs; the order of methods is theirs."""
    summaries = [o.summary for o in outcomes.values() if o.summary is not None]
    tested = all(summary.overall.test is not None for summary in summaries)
    split: Literal["test", "validation"] = "test" if tested else "validation"
    methods = list(dict.fromkeys(case.method for case in outcomes))
    kinds = list(dict.fromkeys((case.budget, case.equal) for case in outcomes))
    groups = []
    for budget, equal in kinds:
        rows = []
        for method in methods:
            own = {
                case.seed: outcome
                for case, outcome in outcomes.items()
                if (case.method, case.budget) == (method, budget)
                and case.equal == (equal and method != REFERENCE)
            }
            label = next(case.label for case in outcomes if case.method == method)
            if own:
                rows.append(Row(method=method, label=label, outcomes=own, split=split))
        groups.append(Group(budget=budget, equal=equal, rows=rows))
    return Comparison(groups=groups, outcomes=dict(outcomes))


def total(account: Account) -> Work:
    """Return all work of a run but what was done twice after a kill."""
    works = [getattr(account, row) for row in _ROWS if row != "repeated"]
    return sum(works, start=Work())


_ROWS = tuple(field.name for field in fields(Account))


def _mean_work(works: Sequence[Work]) -> Work:
    count = len(works)
    return Work(
        tokens=round(sum(work.tokens for work in works) / count),
        flops=round(sum(work.flops for work in works) / count),
    )


def _group_tree(group: Group) -> dict[str, Any]:
    return {
        "budget": group.budget,
        "equal": group.equal,
        "methods": {row.label: _row_tree(group, row) for row in group.rows},
    }


def _row_tree(group: Group, row: Row) -> dict[str, Any]:
    names = sorted({name for summary in row.runs.values() for name in summary.scores})
    return {
        "method": row.method,
        "split": row.split,
        "seeds": sorted(row.runs),
        "compute_budget": row.budget(),
        "scores": {name: _estimate_tree(row.score(name)) for name in [*names, OVERALL]},
        "values": {str(seed): value for seed, value in sorted(row.values(OVERALL).items())},
        "spread": _estimate_tree(row.spread()),
        "difference_to_sft": _estimate_tree(group.difference(row)),
        "work": {name: asdict(work) for name, work in row.work().items()},
        "seconds": row.seconds(),
        "disk_overhead": row.disk(),
    }


def _estimate_tree(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
