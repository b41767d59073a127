"""The experiment's tables, beside the paper's figures, between two comments in ``docs/RESULTS.md``.

Everything in them is computed from the runs' journals and their counts of right answers; the prose
around the comments is written by hand.

Example::

    write_section("mixture10", tables(findings))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.trajectories import ROOT
from trainer.comparison.peak_shifts import (
    StagePeak,
    find_peak_shifts,
    find_stage_peaks,
    mean_peak_distance,
)
from trainer.comparison.results import Comparison, Estimate, Group, Row, estimate
from trainer.comparison.tables import NOTES, build_sections, describe_comparison, describe_failures
from trainer.config.schema import OVERALL
from trainer.journal import Record, effective, read
from trainer.text import Table
from trainer.training.directory import JOURNAL

RESULTS = ROOT / "docs" / "RESULTS.md"
PAPER = {"sft": 61.9, "dynamix": 62.1, "ies": 62.5, "single_rollout": 63.4, "msft": 63.7}
"""Average accuracy in percent over 10 benchmarks and 6 base models (arXiv 2603.21606)."""
PAPER_DISTANCE, PAPER_SHIFT = 1.93, 0.91
"""Epochs between the sub-datasets' peaks and the mixture's, and that an exclusion moves a peak."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The data of the tables."""

    comparison: Comparison
    directory: Path
    """Of the comparison."""
    exact: Mapping[str, Mapping[str, float]]
    """Share of right answers by run, as its path in ``directory``, and sub-dataset."""
    overrides: Sequence[str]
    """Changes to the recipe."""
    machine: Mapping[str, str]


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Write ``text`` between the comments of that name, which the file must have."""
    begin, end = f"<!-- {name}: written by python -m bench.mixture10 -->", f"<!-- end of {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path} has no place for the tables: {begin} … {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")


def tables(findings: Findings) -> str:
    """Return all tables as Markdown."""
    comparison, machine = findings.comparison, findings.machine
    changed = f" Changed: {', '.join(findings.overrides)}." if findings.overrides else ""
    parts = [
        f"{machine['date']}, {machine['cpu']}, commit {machine['commit']}.{changed} "
        + describe_comparison(comparison),
        *(f"- {remark}" for remark in describe_failures(comparison)),
        "### At a glance",
        "The paper's column: its published average accuracy in percent over 10 benchmarks and 6 "
        "base models, of which only the order of the methods can be compared. Ours: mean token "
        "loss (lower is better), the paired difference of it to SFT at the same budget, and right "
        "answers in percent.",
        glance(findings).to_markdown(),
        *peak_parts(findings),
    ]
    for section in build_sections(comparison):
        parts += [f"### {section.title}", section.table.to_markdown()]
    for group in comparison.groups:
        table = exact_table(group, findings.exact, comparison)
        parts += [f"### {group.title}: right answers in percent", table.to_markdown()]
    return "\n\n".join([*parts, *NOTES]) + "\n"


def glance(findings: Findings) -> Table:
    """Return one row a method: the paper's figure, and ours of every group."""
    groups = findings.comparison.groups
    header = ["", "paper"]
    for group in groups:
        header += [group.title, "to SFT", "right"]
    rows = []
    for first in groups[0].rows:
        cells = [first.label, str(PAPER.get(first.method, "-"))]
        for group in groups:
            row = group.row(first.method)
            if row is None:
                cells += ["-", "-", "-"]
                continue
            right = _exact(group, row, OVERALL, findings.exact, findings.comparison)
            cells += [
                _text(row.score(OVERALL)),
                _text(group.difference(row), sign="+"),
                _percent(right),
            ]
        rows.append(cells)
    return Table(header=header, rows=rows)


def exact_table(
    group: Group, exact: Mapping[str, Mapping[str, float]], comparison: Comparison
) -> Table:
    """Return the right answers of a group by sub-dataset, in percent."""
    names = sorted({name for found in exact.values() for name in found} - {OVERALL})
    rows = [
        [name, *(_percent(_exact(group, row, name, exact, comparison)) for row in group.rows)]
        for name in [*names, OVERALL]
    ]
    return Table(header=("sub-dataset", *(row.label for row in group.rows)), rows=rows)


def peak_parts(findings: Findings) -> list[str]:
    """Return the peaks in the runs of the largest budget: SFT's curves, MSFT's exclusions."""
    largest = max(case.budget for case in findings.comparison.outcomes)
    sft, msft = (_journals(findings, method, largest) for method in ("sft", "msft"))
    if not sft:
        return []
    peaks = [find_stage_peaks(counted, 1) for counted in sft]
    apart = estimate(found for found in map(mean_peak_distance, peaks) if found is not None)
    moved = [shift for counted in msft for shift in find_peak_shifts(counted)]
    lines = [
        f"the sub-datasets' peaks are {_text(apart)} epochs from the mixture's (paper: "
        f"{PAPER_DISTANCE})"
    ]
    if any(shift.is_known for shift in moved):
        known = estimate(abs(shift.epochs) for shift in moved if shift.is_known)
        lines.append(
            f"an exclusion moves the other peaks by {_text(known)} epochs (paper: {PAPER_SHIFT}; "
            f"{sum(shift.is_known for shift in moved)} pairs in which both peaks had passed)"
        )
    return [
        f"### Peaks, C = {largest:g}",
        f"On average {'; '.join(lines)}. By seed; > is a peak at the end, which may come later.",
        _peak_table(peaks, msft).to_markdown(),
    ]


def _peak_table(
    peaks: Sequence[Mapping[str, StagePeak]], msft: Sequence[Sequence[Record]]
) -> Table:
    names = sorted({name for found in peaks for name in found} - {OVERALL})
    rows = []
    for name in [*names, OVERALL]:
        left = [_exclusion(counted, name) for counted in msft]
        rows.append(
            [name, ", ".join(_peak_text(found.get(name)) for found in peaks), ", ".join(left)]
        )
    return Table(
        header=("sub-dataset", "SFT peaks at epoch", "MSFT excludes it after stage: epoch"),
        rows=rows,
    )


def _exclusion(counted: Sequence[Record], name: str) -> str:
    for record in counted:
        if record["event"] == "decided" and name in (record.get("exclude") or ()):
            epochs = {
                r["checkpoint"]: r["epoch"]
                for r in counted
                if r["event"] == "evaluated" and r["stage"] == record["stage"]
            }
            return f"{record['stage']}: {epochs.get(record['checkpoint'], 0):.3g}"
    return "-"


def _journals(findings: Findings, method: str, budget: float) -> list[list[Record]]:
    return [
        effective(read(findings.directory / case.path / JOURNAL))
        for case, outcome in findings.comparison.outcomes.items()
        if (case.method, case.budget, case.equal_compute) == (method, budget, False)
        and outcome.summary is not None
    ]


def _exact(
    group: Group,
    row: Row,
    name: str,
    exact: Mapping[str, Mapping[str, float]],
    comparison: Comparison,
) -> Estimate | None:
    paths = {
        str(case.path)
        for case, outcome in comparison.outcomes.items()
        if case.method == row.method and row.outcomes.get(case.seed) is outcome
    }
    return estimate(exact[path][name] for path in sorted(paths & set(exact)))


def _peak_text(peak: StagePeak | None) -> str:
    if peak is None:
        return "-"
    return f"{'' if peak.has_passed else '>'}{peak.epoch:.3g}"


def _text(found: Estimate | None, *, sign: str = "") -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:{sign}.3f}"
    return mean if found.error is None else f"{mean} ± {found.error:.3f}"


def _percent(found: Estimate | None) -> str:
    if found is None:
        return "-"
    mean = f"{100 * found.mean:.1f}"
    return mean if found.error is None else f"{mean} ± {100 * found.error:.1f}"
