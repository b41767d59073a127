"""Aggregate the runs of a comparison: means over seeds, differences to SFT, and work.

Runs are grouped by budget. The runs at MSFT's FLOPs form a group of their own, together with
MSFT's ordinary runs.

Example::

    comparison = group_outcomes(outcomes)
    row = comparison.groups[0].row("msft")
    row.score(OVERALL), comparison.groups[0].difference(row)
    estimate([0.61, 0.63, 0.62])                # mean 0.62, error 0.0058, count 3
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from trainer.comparison.grid import REFERENCE, Case
from trainer.config.schema import OVERALL
from trainer.journal import replace_non_finite
from trainer.report.flops import Account, Work
from trainer.report.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its standard error."""

    mean: float
    error: float | None
    """Standard error of the mean, from the sample variance; ``None`` for a single value."""
    count: int


def estimate(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard error; ``None`` without values. One NaN makes both NaN."""
    numbers = list(values)
    count = len(numbers)
    if not numbers:
        return None
    if not all(map(math.isfinite, numbers)):
        return Estimate(mean=math.nan, error=math.nan if count > 1 else None, count=count)
    error = statistics.stdev(numbers) / math.sqrt(count) if count > 1 else None
    return Estimate(mean=statistics.mean(numbers), error=error, count=count)


def estimate_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean difference ``ours - theirs`` over the seeds that both have.

    The error is that of the differences, so an effect of the seed on both methods cancels.
    """
    return estimate(ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs)))


def standard_deviation(values: Iterable[float]) -> float:
    """Return the population standard deviation; NaN if a value is not finite.

    It divides by n, because the sub-datasets are the whole mixture and not a sample.
    """
    numbers = list(values)
    return statistics.pstdev(numbers) if all(map(math.isfinite, numbers)) else math.nan


BASELINE = "sft"
"""The method that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one run."""

    budget: float
    """The C of the run, in epochs."""
    summary: Summary | None
    """``None`` if the run did not finish."""
    failure: str = ""
    """Why the run did not finish, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at a budget, over seeds."""

    method: str
    label: str
    outcomes: Mapping[int, Outcome]
    split: Literal["test", "validation"]
    """The examples that its scores are of."""

    @property
    def runs(self) -> dict[int, Summary]:
        """The finished runs, by seed."""
        return {s: o.summary for s, o in self.outcomes.items() if o.summary is not None}

    @property
    def names(self) -> list[str]:
        """The sub-datasets, sorted."""
        return sorted({name for summary in self.runs.values() for name in summary.scores})

    def values(self, name: str) -> dict[int, float]:
        """Return the metric of a sub-dataset, or of the mixture (``OVERALL``), by seed."""
        found = {}
        for seed, summary in self.runs.items():
            scores = summary.scores_of(name)
            value = scores.test if self.split == "test" else scores.validation
            if value is not None:
                found[seed] = value
        return found

    def score(self, name: str) -> Estimate | None:
        """Return the metric of a sub-dataset, or of the mixture, over seeds."""
        return estimate(self.values(name).values())

    def spread(self) -> Estimate | None:
        """Return the standard deviation across sub-datasets, over seeds.

        ``None`` if these have different metrics.
        """
        if not all(summary.has_one_metric for summary in self.runs.values()):
            return None
        by_name = [self.values(name) for name in self.names]
        shared = [seed for seed in self.runs if by_name and all(seed in v for v in by_name)]
        return estimate(standard_deviation([values[seed] for values in by_name]) for seed in shared)

    def work(self) -> dict[str, Work]:
        """Return the mean work of a run by the rows of its account, and their ``total``."""
        accounts = [summary.account for summary in self.runs.values()]
        if not accounts:
            return {}
        rows = {row: [getattr(account, row) for account in accounts] for row in _ROWS}
        return {
            name: Work(
                tokens=round(statistics.mean(work.tokens for work in works)),
                flops=round(statistics.mean(work.flops for work in works)),
            )
            for name, works in rows.items()
        }

    def budget(self) -> float | None:
        """Return the mean C of the finished runs."""
        return _mean(o.budget for o in self.outcomes.values() if o.summary is not None)

    def seconds(self) -> float | None:
        """Return the mean time that a run spent in training, evaluation and commits."""
        return _mean(summary.seconds for summary in self.runs.values())

    def disk(self) -> float | None:
        """Return the mean peak disk overhead, in full checkpoints."""
        return _mean(summary.disk.peak for summary in self.runs.values() if summary.disk)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return statistics.mean(numbers) if numbers else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """All methods at one budget."""

    budget: float
    equal_compute: bool
    """True if every method but MSFT has the C at which it takes MSFT's FLOPs."""
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        """The title of its tables."""
        return f"C = {self.budget:g}" + (", all at MSFT's FLOPs" if self.equal_compute else "")

    def row(self, method: str) -> Row | None:
        """Return the row of a method, or ``None``."""
        return next((row for row in self.rows if row.method == method), None)

    def difference(self, row: Row) -> Estimate | None:
        """Return the overall metric's difference to SFT, paired by seed; ``None`` for SFT."""
        sft = self.row(BASELINE)
        if sft is None or row.method == BASELINE:
            return None
        return estimate_difference(row.values(OVERALL), sft.values(OVERALL))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All groups and outcomes of a comparison."""

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
        """The runs that diverged; their scores are those of the best checkpoint before that."""
        return [c for c, o in self.outcomes.items() if o.summary is not None and o.summary.diverged]

    @property
    def seeds(self) -> list[int]:
        """The seeds, each once."""
        return sorted({case.seed for case in self.outcomes})

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values; numbers that are not finite become ``None``."""
        first = self.first
        tree: dict[str, Any] = {
            "metric": first.metric if first else None,
            "mode": first.mode if first else None,
            "seeds": self.seeds,
            "groups": [
                {
                    "budget": group.budget,
                    "equal": group.equal_compute,
                    "methods": {row.label: _row_to_dict(group, row) for row in group.rows},
                }
                for group in self.groups
            ],
            "runs": {
                str(case.path): {
                    "method": case.method,
                    "budget": case.budget,
                    "equal": case.equal_compute,
                    "seed": case.seed,
                    "compute_budget": outcome.budget,
                    "failure": outcome.failure or None,
                    "diverged": case in self.diverged,
                    "diagnosis": outcome.summary.diagnosis.to_dict()
                    if outcome.summary and outcome.summary.diagnosis
                    else None,
                    "flops": outcome.summary.account.total.flops if outcome.summary else None,
                }
                for case, outcome in self.outcomes.items()
            },
        }
        finite: dict[str, Any] = replace_non_finite(tree)
        return finite


def group_outcomes(outcomes: Mapping[Case, Outcome]) -> Comparison:
    """Group the outcomes of all runs by budget and method, in their order."""
    summaries = [o.summary for o in outcomes.values() if o.summary is not None]
    tested = all(summary.overall.test is not None for summary in summaries)
    split: Literal["test", "validation"] = "test" if tested else "validation"
    labels = {case.method: case.label for case in outcomes}
    kinds = list(dict.fromkeys((case.budget, case.equal_compute) for case in outcomes))
    groups = []
    for budget, equal in kinds:
        rows = []
        for method, label in labels.items():
            own = {
                case.seed: outcome
                for case, outcome in outcomes.items()
                if (case.method, case.budget) == (method, budget)
                and case.equal_compute == (equal and method != REFERENCE)
            }
            if own:
                rows.append(Row(method=method, label=label, outcomes=own, split=split))
        groups.append(Group(budget=budget, equal_compute=equal, rows=rows))
    return Comparison(groups=groups, outcomes=dict(outcomes))


_ROWS = (*(field.name for field in fields(Account)), "total")


def _row_to_dict(group: Group, row: Row) -> dict[str, Any]:
    def values_of(found: Estimate | None) -> dict[str, Any] | None:
        return None if found is None else asdict(found)

    return {
        "method": row.method,
        "split": row.split,
        "seeds": sorted(row.runs),
        "compute_budget": row.budget(),
        "scores": {name: values_of(row.score(name)) for name in [*row.names, OVERALL]},
        "values": {str(seed): value for seed, value in sorted(row.values(OVERALL).items())},
        "spread": values_of(row.spread()),
        "difference_to_sft": values_of(group.difference(row)),
        "work": {name: asdict(work) for name, work in row.work().items()},
        "seconds": row.seconds(),
        "disk_overhead": row.disk(),
    }
