"""Make the tables of a comparison, for the terminal, Markdown and HTML.

Example::

    for section in build_sections(comparison):
        print(section.title, section.table.to_text(), sep="\n\n")
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.comparison.html import Section
from trainer.comparison.results import Comparison, Estimate, Group, Row
from trainer.config.schema import OVERALL
from trainer.report.headroom_table import headroom_notes, headroom_table
from trainer.text import Table, flops_text, metric_name_text, metric_text

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

NOTES = (
    "Selection on validation data, scores on test data used once per run. ± is the standard error "
    "of the mean over seeds; differences are paired by seed, so theirs is that of the differences.",
    "Spread is the standard deviation across sub-datasets. FLOPs are model FLOPs of one run, mean "
    "over seeds; the total leaves out what was repeated after a kill.",
    "Disk is the peak of all rollback points together, in full checkpoints.",
)


def build_sections(comparison: Comparison) -> list[Section]:
    """Return the tables, two for each group: scores and work."""
    return [
        Section(title=f"{group.title}: {what}", table=table)
        for group in comparison.groups
        for what, table in (("scores", build_score_table(group)), ("work", build_work_table(group)))
    ]


def build_headroom_parts(comparison: Comparison) -> list[Section | str]:
    """Return headroom and forgetting of each run of MSFT, or of SFT if there is none of MSFT."""
    found = {
        case: outcome.summary.diagnosis
        for case, outcome in comparison.outcomes.items()
        if outcome.summary is not None and outcome.summary.diagnosis is not None
    }
    methods = {case.method for case in found}
    method = next((one for one in ("msft", "sft") if one in methods), None)
    parts: list[Section | str] = []
    for case, diagnosis in found.items():
        if case.method == method:
            title = f"{case.name}: headroom and forgetting"
            parts.append(Section(title=title, table=headroom_table(diagnosis)))
            parts += headroom_notes(diagnosis)
    return parts


def describe_comparison(comparison: Comparison) -> str:
    """Return one sentence that describes metric, seeds and settings."""
    first = comparison.first
    if first is None:
        return "No run has finished."
    seeds = comparison.seeds
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]}"
    split = comparison.groups[0].rows[0].split
    sentences = [
        f"{split.capitalize()} {metric_name_text(first.metric, first.mode)}, {which}; "
        f"lr {first.lr:g}, {first.dtype}.",
        first.overall_text(),
        first.untested_text() if split == "test" else "",
    ]
    return " ".join(filter(None, sentences))


def describe_failures(comparison: Comparison) -> list[str]:
    """Return a sentence for each run that did not finish or diverged."""
    failed = [f"{case.name} did not finish: {why}" for case, why in comparison.failures.items()]
    return failed + [
        f"{case.name} diverged: its scores are those of its best checkpoint before that."
        for case in comparison.diverged
    ]


def render_text(comparison: Comparison) -> str:
    """Return the whole comparison as text for the terminal."""
    parts = [describe_comparison(comparison)]
    for section in build_sections(comparison):
        parts += [section.title, section.table.to_text()]
    for part in build_headroom_parts(comparison):
        parts += [part] if isinstance(part, str) else [part.title, part.table.to_text()]
    return "\n\n".join([*parts, *describe_failures(comparison)])


def build_score_table(group: Group) -> Table:
    """Return the metric by sub-dataset and method; the base comes from the first finished run."""
    rows = group.rows
    base = _base_metrics(group)
    body: list[Sequence[str]] = [
        [name, metric_text(base.get(name)), *(_format_estimate(row.score(name)) for row in rows)]
        for name in base
    ]
    body.append(["spread", "", *(_format_estimate(row.spread()) for row in rows)])
    if any(group.difference(row) is not None for row in rows):
        differences = [_format_estimate(group.difference(row), signed=True) for row in rows]
        body.append(["overall - SFT", "", *differences])
    body.append(["runs", "", *(_format_runs(row) for row in rows)])
    return Table(header=("sub-dataset", "base", *(row.label for row in rows)), rows=body)


def build_work_table(group: Group) -> Table:
    """Return the mean work of a run of each method; columns of zeros are omitted."""
    works = [row.work() for row in group.rows]
    columns = [name for name in _WORK if any(name in w and w[name].flops for w in works)]
    body = [
        [
            row.label,
            _format(row.budget(), ".4g"),
            *(flops_text(work[name].flops) if name in work else "-" for name in columns),
            _format(row.seconds(), ",.0f", " s"),
            _format(row.disk(), ".2f"),
        ]
        for row, work in zip(group.rows, works, strict=True)
    ]
    return Table(header=("", "C", *(_WORK[name] for name in columns), "time", "disk"), rows=body)


def _base_metrics(group: Group) -> dict[str, float | None]:
    """Return the base's metrics by sub-dataset and overall, from the first finished run."""
    for row in group.rows:
        for summary in row.runs.values():
            scores = {**summary.scores, OVERALL: summary.overall}
            is_test = row.split == "test"
            return {n: s.base_test if is_test else s.base_validation for n, s in scores.items()}
    return {OVERALL: None}


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _format_runs(row: Row) -> str:
    """Return the number of finished runs, and of all runs if some did not finish."""
    done, asked = len(row.runs), len(row.outcomes)
    return str(done) if done == asked else f"{done} of {asked}"


def _format_estimate(found: Estimate | None, *, signed: bool = False) -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:+.3f}" if signed else metric_text(found.mean)
    return mean if found.error is None else f"{mean} ± {metric_text(found.error)}"
