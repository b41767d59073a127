"""Draw plots of a store with matplotlib, which is optional (the extra ``report``).

Example::

    draw_changes(store.diff(a, b), "changes.png")
    draw_lineage(store.log(), store.bases(), store.refs(), "lineage.svg")
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msft_store._util import PathLike, check_path, format_bytes, format_count
from msft_store.cli.lineage import format_metrics
from msft_store.cli.output import printable
from msft_store.errors import InvalidInputError, StorageError
from msft_store.maintenance.diff import TensorDiff
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.refs import TIMELINES

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_MORE_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")
_SHADES = " ░▒▓█"
_MOST_KINDS = 40
"""With more kinds, tensors whose names differ only by a number, such as experts, share one."""
_LABEL_WIDTH = 60
_LEGEND_WIDTH = 130
_LINE_INCHES = 0.17
_MAX_LEGEND_LINES = 60
_MAX_LISTED = 12
"""With more checkpoints, the legend lists only those with a ref."""
_SUFFIXES = (".png", ".svg", ".pdf")
_MAX_INCHES = 40.0
"""Largest side of a picture; more rows or columns stand closer together."""


def heat_map(diffs: Sequence[TensorDiff]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return the layers, the kinds of tensors, and the changed share of each layer and kind.

    The layer is the first number in a tensor's name, with the prefix if the prefixes differ (an
    encoder and a decoder). The kind is the rest of the name. Tensors without a layer are left out,
    unless none has one. The share is ``None`` if a layer has no tensor of the kind.
    """
    both = [diff for diff in diffs if diff.kind in ("equal", "changed")]
    layered = [(found, diff) for diff in both if (found := _NUMBER.search(diff.name))]
    one_stack = len({diff.name[: found.start(1)] for found, diff in layered}) == 1
    crowded = len({diff.name[found.end() :] for found, diff in layered}) > _MOST_KINDS
    cells: dict[tuple[tuple[str, int], str], tuple[int, int]] = {}
    for found, diff in layered:
        kind = diff.name[found.end() :]
        place = (
            ("" if one_stack else diff.name[: found.start(1)], int(found[1])),
            _MORE_NUMBERS.sub("*", kind) if crowded else kind,
        )
        changed, elements = cells.get(place, (0, 0))
        cells[place] = changed + diff.changed, elements + diff.elements
    if not layered:
        cells = {(("-", 0), diff.name): (diff.changed, diff.elements) for diff in both}
    layers = sorted({layer for layer, _ in cells})
    kinds = sorted({kind for _, kind in cells})
    rows = [[_share(cells.get((layer, kind))) for kind in kinds] for layer in layers]
    return [f"{stack}{number}" if layered else stack for stack, number in layers], kinds, rows


def heat_text(diffs: Sequence[TensorDiff]) -> str:
    """Return a heat map for a terminal; empty text for a single layer, or if nothing changed."""
    layers, kinds, rows = heat_map(diffs)
    most = max((share for row in rows for share in row if share is not None), default=0.0)
    if len(layers) < 2 or not most:
        return ""
    width, each = max(5, *map(len, layers)), 2 if len(kinds) <= _MOST_KINDS else 1
    lines = [f"share changed by layer, {_SHADES[1]} little to {_SHADES[-1]} {100 * most:.3g} %"]
    lines += [
        f"{layer:>{width}} |{''.join(each * _shade(share, most) for share in row)}|"
        for layer, row in zip(layers, rows, strict=True)
    ]
    return "\n".join([*lines, f"columns: {', '.join(kinds)}"])


def draw_changes(diffs: Sequence[TensorDiff], path: PathLike, *, title: str = "") -> Path:
    """Draw the heat map into a file; return its path.

    :class:`InvalidInputError` if no tensors can be compared, or for a suffix other than .png, .svg
    and .pdf.
    """
    check_picture(path)
    layers, kinds, rows = heat_map(diffs)
    if not rows:
        raise InvalidInputError("cannot draw a heat map: the two have no tensor in common")
    label_height = 0.07 * max(len(_label(kind)) for kind in kinds)
    figure, (axes,) = _canvas(
        min(_MAX_INCHES, max(6.0, 0.4 * len(kinds) + 3)),
        min(_MAX_INCHES, max(1.2, 0.28 * len(layers)) + label_height + 1.0),
    )
    percents = [[math.nan if s is None else 100 * s for s in row] for row in rows]
    image = axes.imshow(percents, aspect="auto", cmap="viridis", vmin=0)
    _name_ticks(axes.set_xticks, kinds, rotation=60, ha="right")
    _name_ticks(axes.set_yticks, layers)
    axes.set_ylabel("layer")
    # Label the bar below it, because beside it the label would be longer than a bar of few layers.
    figure.colorbar(image, format="%g %%").ax.set_xlabel("changed", fontsize=8)
    axes.set_title(_label(title), parse_math=False)
    return _save(figure, path)


def draw_lineage(
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[Base],
    refs: Mapping[str, str],
    path: PathLike,
) -> Path:
    """Draw checkpoints by step and branch, each joined to its parent; return the file's path.

    The area of a point shows the stored bytes; a filled point has a ref. A legend lists the bases
    and the checkpoints with their metrics and their refs, except those of timelines. If there are
    many checkpoints, it lists only those with such a ref. :class:`InvalidInputError` for a suffix
    other than .png, .svg and .pdf.
    """
    check_picture(path)
    in_order = any(checkpoint.step is None for checkpoint in checkpoints)
    steps = [number if in_order else c.step or 0 for number, c in enumerate(checkpoints)]
    names, lanes = _lanes(checkpoints, steps)
    at: dict[str, tuple[float, int]] = {
        c.id: (x, lanes[c.id]) for c, x in zip(checkpoints, steps, strict=True)
    }
    first, last = min(steps, default=0), max(steps, default=0)
    # A base has no step, so draw it before the first one.
    base_x = first - max(1, 0.08 * (last - first))
    for base in bases:
        own = [lanes[c.id] for c in checkpoints if c.base == base.id]
        if not own:
            names.append("")
        at[base.id] = base_x, min(own, default=len(names) - 1)
    legend = _legend(checkpoints, bases, refs)
    figure, (axes, below) = _canvas(
        11.0,
        min(_MAX_INCHES, max(3.0, 0.6 * len(names) + 1.5)),
        _LINE_INCHES * len(legend) + 0.1,
    )
    for base in bases:
        axes.plot(*at[base.id], marker="s", color="0.4", zorder=2)
    # Draw one line with gaps, because drawing thousands of lines takes many seconds.
    corners: list[tuple[float, float]] = []
    for checkpoint in checkpoints:
        parent = at.get(checkpoint.parent or "", at.get(checkpoint.base or ""))
        if parent is not None:
            x, y = at[checkpoint.id]
            corners += [parent, (parent[0], y), (x, y), (math.nan, math.nan)]
    axes.plot(*zip(*corners, strict=True), color="0.7", linewidth=1, zorder=1)
    most = max((checkpoint.stored_bytes for checkpoint in checkpoints), default=0) or 1
    pinned = set(refs.values())
    axes.scatter(
        steps,
        [lanes[c.id] for c in checkpoints],
        s=[20 + 180 * c.stored_bytes / most for c in checkpoints],
        facecolor=["tab:blue" if c.id in pinned else "white" for c in checkpoints],
        edgecolor="tab:blue",
        zorder=3,
    )
    above: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
    for identity, mark, _ in legend:
        axes.annotate(mark, at[identity], fontsize=8, zorder=4, **above)
    listed = "\n".join(f"{mark:>4} {text}" for _, mark, text in legend)
    style: dict[str, Any] = {"fontsize": 8, "family": "monospace", "linespacing": 1.4}
    below.text(0, 1, listed, va="top", parse_math=False, transform=below.transAxes, **style)
    below.set_axis_off()
    axes.set_xlabel("order" if in_order else "step")
    axes.set_ylabel("branch")
    axes.margins(x=0.05)
    axes.set_ylim(-0.6, max(len(names), 1) - 0.2)
    _name_ticks(axes.set_yticks, names)
    axes.xaxis.get_major_locator().set_params(integer=True)
    shown = {round(x): f"{x:.0f}" for x in axes.get_xticks() if first <= x <= last}
    if bases:
        shown[base_x] = "base"
        axes.axvline((base_x + first) / 2, color="0.8", linestyle=":", linewidth=1, zorder=0)
    axes.set_xticks(list(shown), list(shown.values()))
    axes.set_title(
        f"{format_count(len(checkpoints), 'checkpoint')}; the largest point is {format_bytes(most)}"
    )
    return _save(figure, path)


def _lanes(
    checkpoints: Sequence[Checkpoint], steps: Sequence[int]
) -> tuple[list[str], dict[str, int]]:
    """Return the names of the lanes, and the lane of each checkpoint.

    Each branch of a timeline has its own lane. Another checkpoint continues the lane of its parent,
    or else a lane of the same base that has ended before.
    """
    branches = [_branch(checkpoint) for checkpoint in checkpoints]
    several = len({place[0] for place in branches if place}) > 1
    names: list[str] = []
    taken: dict[tuple[str, int], int] = {}
    ends: dict[int, tuple[int, str, str | None]] = {}
    lanes: dict[str, int] = {}
    for checkpoint, place, step in zip(checkpoints, branches, steps, strict=True):
        lane: int | None
        if place is not None:
            lane = taken.get(place)
        else:
            continued = (at for at, (_, end, _) in ends.items() if end == checkpoint.parent)
            ended = (
                at
                for at, (last, _, base) in ends.items()
                if last < step and base == checkpoint.base
            )
            lane = next(continued, next(ended, None))
        if lane is None:
            lane = len(names)
            names.append("" if place is None else " ".join(map(str, place[not several :])))
        if place is not None:
            taken[place] = lane
        else:
            ends[lane] = step, checkpoint.id, checkpoint.base
        lanes[checkpoint.id] = lane
    return names, lanes


def _branch(checkpoint: Checkpoint) -> tuple[str, int] | None:
    """Return the timeline and branch of a checkpoint; ``None`` if it is not on a timeline."""
    place = checkpoint.metadata.get("timeline")
    branch = place.get("branch") if isinstance(place, Mapping) else None
    if not isinstance(place, Mapping) or not isinstance(branch, int):
        return None
    return str(place.get("name", "")), branch


def _legend(
    checkpoints: Sequence[Checkpoint], bases: Sequence[Base], refs: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Return the id, mark and text of each line of the legend."""
    found = [
        (
            base.id,
            f"b{number}",
            f"base {base.id[:12]}, {format_bytes(base.logical_bytes)}: {base.path}",
        )
        for number, base in enumerate(bases, 1)
    ]
    names: dict[str, list[str]] = {}
    for name, identity in sorted(refs.items()):
        if not name.startswith(TIMELINES):
            names.setdefault(identity, []).append(name)
    for number, checkpoint in enumerate(checkpoints, 1):
        own = ", ".join(names.get(checkpoint.id, ()))
        if own or len(checkpoints) <= _MAX_LISTED:
            step = "" if checkpoint.step is None else f"step {checkpoint.step}"
            parts = (step, _label(own), _label(format_metrics(checkpoint.metrics)))
            text = ", ".join([checkpoint.id[:12], *(part for part in parts if part)])
            found.append((checkpoint.id, str(number), text))
    return [
        (identity, mark, _label(text, _LEGEND_WIDTH))
        for identity, mark, text in found[:_MAX_LEGEND_LINES]
    ]


def _name_ticks(set_ticks: Callable[..., Any], names: Sequence[str], **style: Any) -> None:
    """Label rows or columns; if there are very many, only every second, third and so on."""
    every = math.ceil(len(names) / 150) or 1
    shown = range(0, len(names), every)
    set_ticks(list(shown), [_label(names[at]) for at in shown], parse_math=False, **style)


def _label(text: str, width: int = _LABEL_WIDTH) -> str:
    """Return text without control characters and line ends, cut to a width."""
    text = printable(text).replace("\n", "\\n")
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _share(cell: tuple[int, int] | None) -> float | None:
    return None if cell is None else cell[0] / cell[1] if cell[1] else 0.0


def _shade(share: float | None, most: float) -> str:
    if share is None:
        return "·"
    if not share:
        return " "
    return _SHADES[max(1, min(len(_SHADES) - 1, math.ceil(share / most * (len(_SHADES) - 1))))]


def check_picture(path: PathLike) -> None:
    """Raise :class:`InvalidInputError` for a suffix other than .png, .svg and .pdf."""
    target = check_path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise InvalidInputError(
            f"cannot draw {target}: a picture's name ends with {' or '.join(_SUFFIXES)}"
        )


def _canvas(width: float, *heights: float) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes, one below the other."""
    try:
        # pyplot would open windows and keep global state.
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise InvalidInputError(
            "drawing needs matplotlib, which is not installed: pip install 'msft-store[report]'"
        ) from None
    figure = figures.Figure(figsize=(width, sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure, [row[0] for row in rows]


def _save(figure: Any, path: PathLike) -> Path:
    target = check_path(path)
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot draw {target}: {error}") from error
    return target
