"""Draw the validation curves, training loss and disk of a run from effective journal records.

Roll-backs are dashed vertical lines. The step counter never goes back, so each stage is one line.

Example::

    png = draw_curves(effective(read(run / "journal.jsonl")))
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from trainer.config.schema import OVERALL
from trainer.journal import Record, run_started, select
from trainer.report.flops import seqs_on_path
from trainer.report.summary import (
    find_result_evaluation,
    find_roll_backs,
    find_sub_dataset_peaks,
    measure_disk_usage,
)
from trainer.text import metric_name_text

_BLUE, _ORANGE, _RED, _PALE, _GREY = "#1f6fb4", "#d9822b", "#c23b22", "#a9c8e6", "#8a8a8a"


def draw_curves(counted: Sequence[Record]) -> bytes:
    """Return a PNG of each sub-dataset's validation metric, and the overall one, over steps.

    A sub-dataset's curve is pale in the stages that do not train on it. A dot marks the peak for
    which it was excluded, and a star marks the result.
    """
    start = run_started(counted)
    names = [*sorted(start["sub_datasets"]), OVERALL]
    columns = min(len(names), min((3, 4), key=lambda columns: -len(names) % columns))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * rows + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        _draw_curve(axis, name, counted)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(names) - columns) : len(names)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("optimizer step")
    figure.suptitle(f"Validation {metric_name_text(start['metric'], start['mode'])}")
    _draw_legend(
        figure,
        Line2D([], [], color=_BLUE, marker=".", label="trained on"),
        Line2D([], [], color=_PALE, marker=".", label="excluded"),
        Line2D([], [], color=_RED, marker="o", linestyle="none", label="peak, then excluded"),
        Line2D([], [], color=_RED, marker="*", linestyle="none", markersize=9, label="result"),
    )
    return _png(figure)


def draw_loss(counted: Sequence[Record]) -> bytes:
    """Return a PNG of the training loss over steps, pale off the path to the result."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    on_path = seqs_on_path(counted)
    for stage in [record["stage"] for record in select(counted, "stage_started")]:
        points = [r for r in select(counted, "trained") if r["stage"] == stage]
        steps = [r["step"] for r in points]
        axis.plot(steps, [r["loss"] for r in points], color=_PALE)
        kept = [r["loss"] if r["seq"] in on_path else math.nan for r in points]
        axis.plot(steps, kept, color=_BLUE)
    _draw_roll_backs(axis, counted)
    _frame(axis, title="Training loss", y="mean token loss", x="optimizer step")
    handles = [
        Line2D([], [], color=_BLUE, label="on the path to the result"),
        Line2D([], [], color=_PALE, label="not on it: rolled back, or after the result"),
        _roll_back_handle(),
    ]
    axis.legend(handles=handles, frameon=False, fontsize="small")
    return _png(figure)


def draw_disk(counted: Sequence[Record]) -> bytes:
    """Return a PNG of the disk of the rollback points over steps, in full checkpoints."""
    start = run_started(counted)
    unit = start["full_checkpoint_bytes"]
    usages = measure_disk_usage(counted)
    steps = [usage.step for usage in usages]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    copies = [usage.paper_copies for usage in usages]
    label = "the paper's disk-managed policy, full copies"
    axis.step(steps, copies, where="post", color=_ORANGE, label=label)
    after = [usage.bytes / unit for usage in usages]
    axis.step(steps, after, where="post", color=_BLUE, label="this run, after eviction")
    before = [usage.peak_bytes / unit for usage in usages]
    axis.plot(steps, before, ".", color=_BLUE, label="this run, before eviction")
    axis.axhline(1, color=_GREY, linewidth=0.8, label="one full checkpoint")
    _draw_roll_backs(axis, counted)
    axis.set_ylim(bottom=0)
    _frame(
        axis,
        title=f"Rollback points on disk (lr {start['config']['train']['lr']:g}, "
        f"{start['model']['dtype']})",
        y="full checkpoints",
        x="optimizer step",
    )
    handles, _ = axis.get_legend_handles_labels()
    _draw_legend(figure, *handles, columns=3)
    return _png(figure)


def _draw_curve(axis: Axes, name: str, counted: Sequence[Record]) -> None:
    evaluated = select(counted, "evaluated")
    for start in select(counted, "stage_started"):
        points = [r for r in evaluated if r["stage"] == start["stage"]]
        color = _BLUE if name == OVERALL or name in start["active"] else _PALE
        values = [r["metrics"][name] for r in points]
        axis.plot([r["step"] for r in points], values, color=color, marker=".", markersize=4)
    _draw_roll_backs(axis, counted)
    peak = find_sub_dataset_peaks(counted).get(name)
    if peak is not None and peak.excluded:
        at = next(r for r in evaluated if (r["stage"], r["epoch"]) == (peak.stage, peak.epoch))
        axis.plot(at["step"], at["metrics"][name], marker="o", color=_RED, markersize=6)
    result = find_result_evaluation(counted)
    if name == OVERALL and result is not None:
        axis.plot(result["step"], result["metrics"][name], marker="*", color=_RED, markersize=11)
    _frame(axis, title=name)


def _draw_roll_backs(axis: Axes, counted: Sequence[Record]) -> None:
    for decided in find_roll_backs(counted):
        axis.axvline(decided["step"], color=_GREY, linestyle="--", linewidth=0.9)


def _draw_legend(figure: Figure, *handles: Artist, columns: int = 5) -> None:
    figure.legend(
        handles=[*handles, _roll_back_handle()],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def _roll_back_handle() -> Line2D:
    return Line2D([], [], color=_GREY, linestyle="--", linewidth=0.9, label="roll-back")


def _frame(axis: Axes, *, title: str, y: str = "", x: str = "") -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_ylabel(y)
    axis.set_xlabel(x)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
