"""Draw the plots of a comparison as SVG, in the colour of the surrounding text.

Example::

    svg = draw_peaks({0: records})                  # for a page; to_svg_file(svg) for a file
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from trainer.comparison.peak_shifts import find_peak_shifts, find_stage_peaks
from trainer.comparison.results import Comparison, Estimate, Group, Row
from trainer.config.schema import OVERALL
from trainer.journal import Record, select
from trainer.report.flops import seqs_on_path
from trainer.text import metric_title

_TEXT = "#010203"
"""A placeholder for the colour of the surrounding text."""
_BLUE, _ORANGE, _GREY = "#3b82c4", "#d9822b", "#8a8a8a"
_COLORS = ("#3b82c4", "#d9822b", "#3f9b5c", "#b65fb0", "#c9a227", "#c23b22")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT
    ),
}

Curves = Mapping[int, Sequence[Record]]
"""Effective records of a method's runs, by seed."""


def draw_peaks(curves: Curves) -> str:
    """Draw the peaks of the sub-datasets in the first stage beside the mixture's peak."""
    peaks = {seed: find_stage_peaks(records, 1) for seed, records in curves.items()}
    names = sorted({name for found in peaks.values() for name in found} - {OVERALL}, reverse=True)
    figure, (axis,) = _make_figure(8.5, 1.2 + 0.28 * len(names))
    for number, found in enumerate(peaks.values()):
        offset = 0.12 * (number - (len(peaks) - 1) / 2)
        for name, peak in found.items():
            if name == OVERALL:
                axis.axvline(peak.epoch, color=_ORANGE, linewidth=1.4, alpha=0.7)
                continue
            filled = _BLUE if peak.has_passed else "none"
            axis.plot(peak.epoch, names.index(name) + offset, "o", mec=_BLUE, mfc=filled, ms=5)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(left=0)
    handles = [
        _dot_handle(_BLUE, "a sub-dataset's peak, one dot a seed"),
        _dot_handle(_BLUE, "at the last evaluation, may come later", hollow=True),
        Line2D([], [], color=_ORANGE, label="the mixture's peak"),
    ]
    _style_axis(axis, x="epoch of the first best")
    return _render_svg(figure, handles, salt="peaks")


def draw_shifts(curves: Curves) -> str:
    """Draw the peaks of the remaining sub-datasets after each exclusion against those before it."""
    figure, (axis,) = _make_figure(5.5, 4.5)
    limit = 0.0
    for records in curves.values():
        for shift in find_peak_shifts(records):
            filled = _BLUE if shift.is_known else "none"
            axis.plot(shift.expected, shift.actual, "o", mec=_BLUE, mfc=filled, ms=5, alpha=0.7)
            limit = max(limit, shift.expected, shift.actual)
    axis.plot([0, limit], [0, limit], color=_GREY, linestyle="--", linewidth=0.9)
    handles = [
        _dot_handle(_BLUE, "both peaks passed"),
        _dot_handle(_BLUE, "one was at a last evaluation", hollow=True),
        Line2D([], [], color=_GREY, linestyle="--", label="unmoved"),
    ]
    axis.set_ylabel("epochs to the peak without the excluded one")
    _style_axis(axis, x="epochs to the peak before")
    return _render_svg(figure, handles, salt="shifts")


def draw_budgets(comparison: Comparison) -> str:
    """Draw metric and FLOPs over C, and metric over FLOPs; hollow points are at MSFT's FLOPs."""
    figure, (metric_axis, flops_axis, efficiency_axis) = _make_figure(10, 3.6, columns=3)
    handles = []
    labels = dict.fromkeys(row.label for group in comparison.groups for row in group.rows)
    for number, label in enumerate(labels):
        scored = _scored_rows(comparison, label)
        ordinary = [(group, row, score) for group, row, score in scored if not group.equal_compute]
        budgets = [group.budget for group, _, _ in ordinary]
        flops = [_flops(row) for _, row, _ in ordinary]
        scores = [score.mean for _, _, score in ordinary]
        errors = [score.error or 0 for _, _, score in ordinary]
        color = _COLORS[number % len(_COLORS)]
        style: Any = {"color": color, "marker": "o", "ms": 4}
        metric_axis.errorbar(budgets, scores, yerr=errors, capsize=2, **style)
        flops_axis.errorbar(budgets, flops, capsize=2, **style)
        efficiency_axis.errorbar(flops, scores, yerr=errors, capsize=2, **style)
        for group, row, score in scored:
            if group.equal_compute and row.method != "msft":
                efficiency_axis.plot(_flops(row), score.mean, "o", mec=color, mfc="none", ms=6)
        handles.append(Line2D([], [], label=label, **style))
    first = comparison.first
    metric = "metric" if first is None else metric_title(first.metric)
    for axis, title, x in (
        (metric_axis, f"overall {metric}", "C, epochs"),
        (flops_axis, "FLOPs of a run", "C, epochs"),
        (efficiency_axis, f"overall {metric}", "FLOPs of a run"),
    ):
        axis.set_title(title, fontsize="medium")
        _style_axis(axis, x=x)
    return _render_svg(figure, handles, salt="budgets")


def draw_losses(runs: Mapping[str, Sequence[Record]]) -> str:
    """Draw the training loss over steps, one panel for each method, from effective records."""
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    width, height = 3.4 * columns + 0.6, 2.3 * rows + 0.5
    figure, axes = _make_figure(width, height, rows, columns, sharey=True)
    for axis in axes[len(runs) :]:
        axis.set_visible(False)
    for axis, (label, records) in zip(axes, runs.items(), strict=False):
        trained = select(records, "trained")
        on_path = seqs_on_path(records)
        for stage in sorted({r["stage"] for r in trained}):
            points = [r for r in trained if r["stage"] == stage]
            kept = [r for r in points if r["seq"] in on_path]
            axis.plot(*_loss_curve(points), color=_BLUE, alpha=0.35, linewidth=1)
            axis.plot(*_loss_curve(kept), color=_BLUE, linewidth=1.3)
        axis.set_title(label, fontsize="medium")
        _style_axis(axis, x="optimizer step")
    handles = [
        Line2D([], [], color=_BLUE, label="on the path to the result"),
        Line2D([], [], color=_BLUE, alpha=0.35, label="not on it"),
    ]
    return _render_svg(figure, handles, salt="losses")


def to_svg_file(svg: str) -> bytes:
    """Return a plot as the content of an SVG file with a white background."""
    white = "<style>svg { background: white; color: black; }</style>"
    head, end, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{end}{white}{rest}\n'.encode()


def _scored_rows(comparison: Comparison, label: str) -> list[tuple[Group, Row, Estimate]]:
    """Return the groups and rows in which a method has a score, by budget."""
    found = []
    for group in sorted(comparison.groups, key=lambda group: group.budget):
        for row in group.rows:
            score = row.score(OVERALL)
            if row.label == label and score is not None:
                found.append((group, row, score))
    return found


def _flops(row: Row) -> float:
    return float(row.work()["total"].flops)


def _loss_curve(points: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [r["step"] for r in points], [r["loss"] for r in points]


def _make_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
        return figure, list(axes.flat)


def _style_axis(axis: Axes, *, x: str) -> None:
    axis.set_xlabel(x)
    axis.grid(linewidth=0.4, alpha=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6))


def _dot_handle(color: str, label: str, *, hollow: bool = False) -> Line2D:
    fill = "none" if hollow else color
    return Line2D([], [], marker="o", linestyle="none", mec=color, mfc=fill, ms=5, label=label)


def _render_svg(figure: Figure, handles: Sequence[Line2D], *, salt: str) -> str:
    """Return the figure as an ``<svg>`` element; ``salt`` makes its ids unique on a page."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    _, start, rest = buffer.getvalue().partition("<svg")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", f"{start}{rest}".strip(), flags=re.DOTALL)
    return text.replace(_TEXT, "currentColor")
