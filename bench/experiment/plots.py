"""Plots of the experiment as SVG files: peaks by sub-dataset, and loss over FLOPs.

Example::

    write_atomic(path, draw_flops(build_rows(records, phase)))
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.experiment.records import find_peak
from bench.experiment.rows import Row, Runs
from bench.experiment.variants import REFERENCE
from trainer.config.schema import OVERALL

_GREY = "#808080"
"""A colour that is read on white and on black."""
_BLUE, _ORANGE = "#3b82c4", "#d9822b"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "experiment",
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _GREY
    ),
}


def draw_peaks(grouped: Mapping[str, Mapping[str, Runs]]) -> bytes:
    """Draw the peaks in SFT's runs, a dot a seed; hollow ones are at the last evaluation."""
    found = {
        mixture: variants[REFERENCE]
        for mixture, variants in grouped.items()
        if REFERENCE in variants
    }
    figure, axes = _figure(list(found) or ["no run"])
    for axis, runs in zip(axes, found.values(), strict=False):
        names: list[str] = []
        for number, run in enumerate(runs.values()):
            curves = run["first_stage"]
            names = sorted(set(curves["values"]) - {OVERALL}, reverse=True)
            for at, name in enumerate([*names, OVERALL]):
                index = find_peak(curves, name)
                if index is None:
                    continue
                epoch, has_passed = curves["epochs"][index], index + 1 < len(curves["epochs"])
                if name == OVERALL:
                    axis.axvline(epoch, color=_ORANGE, linewidth=1, alpha=0.6)
                    continue
                place = at + 0.1 * (number - (len(runs) - 1) / 2)
                axis.plot(epoch, place, "o", mec=_BLUE, mfc=_BLUE if has_passed else "none", ms=4)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlim(left=0)
        axis.set_xlabel("epoch of the first best")
    return _svg(figure)


def draw_flops(rows: Sequence[Row]) -> bytes:
    """Draw the loss of each variant over its total TFLOPs, one panel a mixture."""
    mixtures = list(dict.fromkeys(row.mixture for row in rows))
    figure, axes = _figure(mixtures or ["no run"])
    colors = mpl.color_sequences["tab20"]
    labels = list(dict.fromkeys(row.label for row in rows if "@" not in row.variant))
    for row in rows:
        if row.score is None or row.total is None:
            continue
        axis = axes[mixtures.index(row.mixture)]
        own = next((label for label in reversed(labels) if row.label.startswith(label)), row.label)
        color = colors[labels.index(own) % len(colors)] if own in labels else _GREY
        # Filled: at the variant's own budget; hollow: at the FLOPs of another one.
        is_own = own == row.label
        axis.errorbar(
            row.total.mean,
            row.score.mean,
            yerr=row.score.error or 0,
            fmt="o",
            ms=4,
            color=color,
            mfc=color if is_own else "none",
            label=row.label if is_own else None,
        )
    for axis in axes:
        axis.set_xlabel("total TFLOPs; hollow: at the FLOPs of another")
        axis.set_ylabel("loss")
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
        )
    return _svg(figure)


def _figure(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4 * len(titles), 3.6), layout="constrained")
        axes = list(figure.subplots(1, len(titles), squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.grid(linewidth=0.4, alpha=0.4)
        axis.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r" +$", "", buffer.getvalue(), flags=re.MULTILINE).encode()
