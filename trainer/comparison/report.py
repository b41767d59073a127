"""Write ``compare.md``, ``compare.json``, ``compare.html`` and the plots of a comparison.

Everything in them is derived from the journals of the runs.

Example::

    write_comparison(Path("runs/all"), comparison)
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from trainer.comparison.html import Plot, render_page
from trainer.comparison.peak_shifts import find_peak_shifts, find_stage_peaks, mean_peak_distance
from trainer.comparison.plots import (
    Curves,
    draw_budgets,
    draw_losses,
    draw_peaks,
    draw_shifts,
    to_svg_file,
)
from trainer.comparison.results import Comparison, estimate
from trainer.comparison.tables import (
    NOTES,
    build_headroom_parts,
    build_sections,
    describe_comparison,
    describe_failures,
)
from trainer.files import make_directory, write_atomic, write_json
from trainer.journal import Record, effective, read
from trainer.report.report import compare_table
from trainer.report.summary import Summary

_WHOLE_MIXTURE = ("sft", "single_rollout", "msft")
"""Methods whose first stage trains on the whole mixture from the base, most suitable first."""


def write_comparison(directory: Path, comparison: Comparison) -> None:
    """Write all files of a comparison; at least one run must have finished."""
    drawn = draw_plots(directory, comparison)
    if summaries := summaries_by_method(comparison):
        markdown = f"# Comparison\n\n{compare_table(summaries, markdown=True)}\n"
        tree = {label: summary.to_dict() for label, summary in summaries.items()}
    else:
        markdown, tree = to_markdown(comparison, drawn), comparison.to_dict()
        make_directory(directory / "plots")
        for plot in drawn:
            write_atomic(directory / "plots" / f"{plot.name}.svg", to_svg_file(plot.svg))
    write_atomic(directory / "compare.md", markdown.encode())
    write_json(directory / "compare.json", tree)
    write_atomic(directory / "compare.html", to_html(comparison, drawn).encode())


def summaries_by_method(comparison: Comparison) -> dict[str, Summary]:
    """Return the summaries by label if there is one run for each method, otherwise none."""
    return {
        case.label: outcome.summary
        for case, outcome in comparison.outcomes.items()
        if case.is_single and outcome.summary is not None
    }


def to_markdown(comparison: Comparison, drawn: Sequence[Plot]) -> str:
    """Return ``compare.md``, which links the plots by their relative paths."""
    remarks = [f"- {escape(text, quote=False)}" for text in describe_failures(comparison)]
    parts = ["# Comparison", describe_comparison(comparison), *remarks]
    for section in build_sections(comparison):
        parts += [f"## {section.title}", section.table.to_markdown()]
    for part in build_headroom_parts(comparison):
        if isinstance(part, str):
            parts.append(part)
        else:
            parts += [f"## {part.title}", part.table.to_markdown()]
    parts += ["## How to read this", *NOTES, "## Plots"]
    for plot in drawn:
        parts += [f"### {plot.title}", f"![{plot.title}](plots/{plot.name}.svg)", plot.caption]
    return "\n\n".join(parts) + "\n"


def to_html(comparison: Comparison, drawn: Sequence[Plot]) -> str:
    """Return ``compare.html``, which needs no other file."""
    text = [describe_comparison(comparison), *describe_failures(comparison)]
    parts = [*text, *build_sections(comparison), *build_headroom_parts(comparison), *NOTES]
    return render_page("Comparison", [*parts, *drawn])


def draw_plots(directory: Path, comparison: Comparison) -> list[Plot]:
    """Draw the plots that the finished runs allow; curves are those of the largest budget."""
    largest = max(case.budget for case in comparison.outcomes)
    curves: dict[str, dict[int, Sequence[Record]]] = {}
    labels = {}
    for case, outcome in comparison.outcomes.items():
        if outcome.summary is not None and case.budget == largest and not case.equal_compute:
            records = effective(read(directory / case.path / "journal.jsonl"))
            curves.setdefault(case.method, {})[case.seed] = records
            labels[case.method] = case.label
    at = f"C = {largest:g}"
    found = []
    whole = next((method for method in _WHOLE_MIXTURE if method in curves), None)
    if whole is not None:
        found.append(_plot_peaks(curves[whole], f"first stage of {labels[whole]}, {at}"))
    if any(find_peak_shifts(records) for records in curves.get("msft", {}).values()):
        found.append(_plot_shifts(curves["msft"], at))
    found.append(
        Plot(
            name="budgets",
            title="Metric and FLOPs over C",
            caption="Mean over seeds with its standard error. Hollow: given MSFT's FLOPs.",
            svg=draw_budgets(comparison),
        )
    )
    seed = min((seed for runs in curves.values() for seed in runs), default=None)
    losses = {labels[m]: runs[seed] for m, runs in curves.items() if seed in runs}
    if losses:
        caption = f"Mean token loss of the training batches; seed {seed}, {at}."
        svg = draw_losses(losses)
        found.append(Plot(name="losses", title="Stepwise loss", caption=caption, svg=svg))
    return found


def _plot_peaks(curves: Curves, where: str) -> Plot:
    distances = [mean_peak_distance(find_stage_peaks(records, 1)) for records in curves.values()]
    mean = estimate(value for value in distances if value is not None)
    apart = "" if mean is None else f" They are {mean.mean:.2f} epochs from it on average."
    return Plot(
        name="peaks",
        title="Peaks of the sub-datasets against the mixture's",
        caption=f"First best evaluation on validation data; {where}.{apart}",
        svg=draw_peaks(curves),
    )


def _plot_shifts(curves: Curves, at: str) -> Plot:
    found = [shift for records in curves.values() for shift in find_peak_shifts(records)]
    known = [abs(shift.epochs) for shift in found if shift.is_known]
    mean = f"they moved by {sum(known) / len(known):.2f} epochs on average" if known else "none"
    return Plot(
        name="shifts",
        title="Shift of the peaks after an exclusion",
        caption=(
            "Each dot is a sub-dataset that stayed when another was excluded: epochs from the "
            f"roll-back to its peak, in the stage before and in the stage after; MSFT, {at}. "
            f"{len(known)} of {len(found)} pairs had both peaks passed; {mean}."
        ),
        svg=draw_shifts(curves),
    )
