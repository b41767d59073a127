"""Draw the validation curves, training loss and disk of a run from effective journal records.

Roll-backs are dashed vertical lines. The step counter never goes back, so each stage is one line.

Example::

    png = to_png(draw_curves(effective(read(run / "journal.jsonl"))))
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.algorithms.base import measured
from trainer.config.schema import OVERALL
from trainer.journal import Record, metric_of, mode_of, run_started, select
from trainer.report.axes import StageSteps, epoch_ticks, is_beyond, limits_of
from trainer.report.flops import find_result_evaluation, seqs_on_path
from trainer.report.summary import find_roll_backs, find_sub_dataset_peaks, measure_disk_usage
from trainer.text import metric_name_text, metric_title

_BLUE, _ORANGE, _RED, _PALE, _GREY = "#1f6fb4", "#d9822b", "#c23b22", "#a9c8e6", "#8a8a8a"


def draw_curves(counted: Sequence[Record]) -> Figure:
    """Return a plot of each sub-dataset's validation metric, and the overall one, over steps.

    A sub-dataset's curve is pale in the stages that do not train on it. A dot marks the peak for
    which it was excluded, and a star marks the result. The upper axis has the epochs of each stage.
    An axis may end before the worst values, for the best ones to be told apart.
    """
    start = run_started(counted)
    names = [*sorted(start["sub_datasets"]), OVERALL]
    columns = min(len(names), min((3, 4), key=lambda columns: -len(names) % columns))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * rows + 1.1), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        _draw_curve(axis, name, counted)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(names) - columns) : len(names)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("optimizer step")
    for axis in axes[:columns]:
        _draw_epochs(axis, counted)
    figure.suptitle(f"Validation {metric_name_text(start['metric'], start['mode'])}")
    if any(metric_of(start, name) != start["metric"] for name in names):
        figure.suptitle("Validation metrics; an arrow points to better values")
        for axis, name in zip(axes, names, strict=False):
            arrow = "↑" if mode_of(start, name) == "max" else "↓"
            axis.set_ylabel(f"{metric_title(metric_of(start, name))} {arrow}", fontsize="small")
    _draw_legend(figure, columns=6)
    return figure


def draw_loss(counted: Sequence[Record]) -> Figure:
    """Return a plot of the training loss over steps, pale off the path to the result."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    on_path = seqs_on_path(counted)
    for stage in [record["stage"] for record in select(counted, "stage_started")]:
        points = [r for r in select(counted, "trained") if r["stage"] == stage]
        steps = [r["step"] for r in points]
        if any(r["seq"] not in on_path for r in points):
            label = "not on it: rolled back, or after the result"
            axis.plot(steps, [r["loss"] for r in points], color=_PALE, label=label)
        if any(r["seq"] in on_path for r in points):
            kept = [r["loss"] if r["seq"] in on_path else math.nan for r in points]
            axis.plot(steps, kept, color=_BLUE, label="on the path to the result")
    _draw_roll_backs(axis, counted)
    _frame(axis, title="Training loss", y="mean token loss", x="optimizer step")
    _draw_epochs(axis, counted)
    _draw_legend(figure, columns=3)
    return figure


def draw_disk(counted: Sequence[Record]) -> Figure:
    """Return a plot of the disk of the rollback points over steps, in full checkpoints."""
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
    _draw_legend(figure, columns=3)
    return figure


def _draw_curve(axis: Axes, name: str, counted: Sequence[Record]) -> None:
    evaluated = select(counted, "evaluated")
    for start in select(counted, "stage_started"):
        points = [r for r in evaluated if r["stage"] == start["stage"] and name in _measured(r)]
        is_active = name == OVERALL or name in start["active"]
        axis.plot(
            [r["step"] for r in points],
            [r["metrics"][name] for r in points],
            color=_BLUE if is_active else _PALE,
            marker=".",
            markersize=4,
            label="trained on" if is_active else "excluded",
        )
    _limit(axis, name, counted)
    _draw_roll_backs(axis, counted)
    peak = find_sub_dataset_peaks(counted).get(name)
    if peak is not None and peak.excluded:
        at = next(r for r in evaluated if (r["stage"], r["epoch"]) == (peak.stage, peak.epoch))
        _mark(axis, at, name, marker="o", markersize=6, label="peak, then excluded")
    result = find_result_evaluation(counted)
    if name == OVERALL and result is not None:
        _mark(axis, result, name, marker="*", markersize=11, label="result")
    _frame(axis, title=name)


def _measured(record: Record) -> dict[str, float]:
    return measured(record["metrics"], record.get("carried") or ())


def _mark(axis: Axes, record: Record, name: str, **style: Any) -> None:
    """Draw a mark at an evaluation, whole even at the edge of the axes."""
    axis.plot(
        record["step"],
        record["metrics"][name],
        color=_RED,
        linestyle="none",
        clip_on=False,
        zorder=3,
        **style,
    )


def _limit(axis: Axes, name: str, counted: Sequence[Record]) -> None:
    """End the axis before the worst values if they would hide the best, and say how far they go."""
    mode = mode_of(run_started(counted), name)
    evaluated = select(counted, "evaluated")
    points = [(r["step"], r["metrics"][name]) for r in evaluated if name in _measured(r)]
    stages = {
        start["stage"]
        for start in select(counted, "stage_started")
        if name == OVERALL or name in start["active"]
    }
    trained = [
        r["metrics"][name]
        for r in evaluated
        if r["index"] and r["stage"] in stages and name in _measured(r)
    ]
    limits = limits_of([value for _, value in points], trained, mode)
    if limits is None:
        return
    axis.set_ylim(*limits)
    edge, marker, worst = (limits[1], "^", max) if mode == "min" else (limits[0], "v", min)
    beyond = [(s, v) for s, v in points if v is not None and is_beyond(v, limits)]
    axis.plot(
        [step for step, _ in beyond],
        [edge] * len(beyond),
        color=_GREY,
        marker=marker,
        linestyle="none",
        markersize=5,
        clip_on=False,
        label="beyond the axis",
    )
    reach = worst(value for _, value in beyond)
    axis.set_title(f"to {reach:.3g}", loc="right", fontsize="x-small", color=_GREY)


def _draw_epochs(axis: Axes, counted: Sequence[Record]) -> None:
    """Draw an upper axis with the epochs of each stage."""
    evaluated = select(counted, "evaluated")
    stages = []
    for start in select(counted, "stage_started"):
        points = [r for r in evaluated if r["stage"] == start["stage"]]
        steps, epochs = [r["step"] for r in points], [r["epoch"] for r in points]
        stages.append(StageSteps(steps=steps, epochs=epochs))
    ticks = epoch_ticks(stages)
    upper = axis.secondary_xaxis("top")
    upper.set_xticks([step for step, _ in ticks], [label for _, label in ticks])
    upper.tick_params(labelsize="x-small", length=2)
    upper.set_xlabel("epoch of the stage", fontsize="x-small")


def _draw_roll_backs(axis: Axes, counted: Sequence[Record]) -> None:
    for decided in find_roll_backs(counted):
        axis.axvline(decided["step"], color=_GREY, linestyle="--", linewidth=0.9, label="roll-back")


def _draw_legend(figure: Figure, *, columns: int) -> None:
    """Draw one legend below all axes, with each label that occurs in them."""
    handles: dict[Any, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    figure.legend(
        handles=list(handles.values()),
        labels=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def _frame(axis: Axes, *, title: str, y: str = "", x: str = "") -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_ylabel(y)
    axis.set_xlabel(x)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def to_png(figure: Figure) -> bytes:
    """Return a plot as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
