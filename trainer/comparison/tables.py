"""A comparison as tables, for the terminal, Markdown and HTML alike.

Example::

    for section in sections(comparison):
        print(section.title, section.table.to_text(), sep="\n\n")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.comparison.results import Comparison, Estimate, Group, Row
from trainer.config.schema import OVERALL
from trainer.text import Table, flops_text, metric_text

_WORK = {
    "total": "total",
    "kept": "training, kept",
    "rolled_back": "training, not kept",
    "selection": "selection",
    "padding": "padding",
    "evaluation": "evaluation",
    "generation": "generation",
    "repeated": "repeated",
}
"""Rows of the account as columns: what they are called."""

NOTES = (
    "Selection on validation data, scores on test data used once per run. ± is the standard error "
    "of the mean over seeds; differences are paired by seed, so theirs is that of the differences.",
    "Spread is the standard deviation across sub-datasets. FLOPs are model FLOPs of one run, mean "
    "over seeds; the total leaves out what was repeated after a kill.",
    "Disk is the peak of all rollback points together, in full checkpoints.",
)
"""How the tables are to be read."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table under a title."""

    title: str
    table: Table


def sections(comparison: Comparison) -> list[Section]:
    """Return the tables, two for each group: scores and work."""
    return [
        Section(title=f"{group.title}: {what}", table=table)
        for group in comparison.groups
        for what, table in (("scores", score_table(group)), ("work", work_table(group)))
    ]


def head(comparison: Comparison) -> str:
    """Return one sentence on what is compared."""
    first = comparison.first
    if first is None:
        return "No run has finished."
    seeds = comparison.seeds
    direction = "higher" if first.mode == "max" else "lower"
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]}"
    split = comparison.groups[0].rows[0].split
    return (
        f"{split.capitalize()} {first.metric.replace('_', ' ')} ({direction} is better), {which}; "
        f"lr {first.lr:g}, {first.dtype}."
    )


def remarks(comparison: Comparison) -> list[str]:
    """Return a sentence for each run that did not finish or diverged."""
    failed = [f"{case.name} did not finish: {why}" for case, why in comparison.failures.items()]
    return failed + [f"{case.name} {_DIVERGED}" for case in comparison.diverged]


_DIVERGED = "diverged: its scores are those of its best checkpoint before that."


def to_text(comparison: Comparison) -> str:
    """Return all of it for the terminal."""
    parts = [head(comparison)]
    for section in sections(comparison):
        parts += [section.title, section.table.to_text()]
    return "\n\n".join([*parts, *remarks(comparison)])


def score_table(group: Group) -> Table:
    """Return the metric by sub-dataset, method after method; the base is the first run's."""
    rows = group.rows
    base = _base(group)
    body: list[Sequence[str]] = [
        [name, metric_text(base.get(name)), *(_text(row.score(name)) for row in rows)]
        for name in base
    ]
    body.append(["spread", "", *(_text(row.spread()) for row in rows)])
    if any(group.difference(row) is not None for row in rows):
        differences = [_text(group.difference(row), signed=True) for row in rows]
        body.append(["overall - SFT", "", *differences])
    body.append(["runs", "", *(_runs_text(row) for row in rows)])
    return Table(header=("sub-dataset", "base", *(row.label for row in rows)), rows=body)


def work_table(group: Group) -> Table:
    """Return what a run of each method took, mean over seeds; rows that are zero are left out."""
    works = [row.work() for row in group.rows]
    columns = [name for name in _WORK if any(name in w and w[name].flops for w in works)]
    body: list[Sequence[str]] = []
    for row, work in zip(group.rows, works, strict=True):
        flops = [flops_text(work[name].flops) if name in work else "-" for name in columns]
        budget, seconds, disk = row.budget(), row.seconds(), row.disk()
        body.append(
            [
                row.label,
                "-" if budget is None else f"{budget:.4g}",
                *flops,
                "-" if seconds is None else f"{seconds:,.0f} s",
                "-" if disk is None else f"{disk:.2f}",
            ]
        )
    return Table(header=("", "C", *(_WORK[name] for name in columns), "time", "disk"), rows=body)


def _base(group: Group) -> dict[str, float | None]:
    """Return the base's metrics by sub-dataset and overall, of the first finished run."""
    for row in group.rows:
        for summary in row.runs.values():
            scores = {**summary.scores, OVERALL: summary.overall}
            test = row.split == "test"
            return {n: s.base_test if test else s.base_validation for n, s in scores.items()}
    return {OVERALL: None}


def _runs_text(row: Row) -> str:
    """Return how many runs finished, of how many where some did not."""
    done, asked = len(row.runs), len(row.outcomes)
    return str(done) if done == asked else f"{done} of {asked}"


def _text(found: Estimate | None, *, signed: bool = False) -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:+.3f}" if signed else metric_text(found.mean)
    return mean if found.error is None else f"{mean} ± {metric_text(found.error)}"
