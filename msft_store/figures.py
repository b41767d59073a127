"""Pictures of a store, drawn by matplotlib, which is optional (the extra ``report``).

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

from msft_store.bases import Base
from msft_store.diff import TensorDiff
from msft_store.errors import InvalidInputError, StorageError
from msft_store.manifest import Checkpoint
from msft_store.paths import PathLike, local_path
from msft_store.render import human
from msft_store.tree import metrics_text

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_MORE_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")
_SHADES = " ░▒▓█"
_MOST_KINDS = 40
"""Columns from which tensors are put together that differ by a number, such as an expert's."""
_LONGEST_LABEL = 60
_MOST_LABELS = 60
_METRICS_OF = 12
"""Checkpoints up to which each has its metrics beside it; of more, only those with a ref."""
_TALLEST = 40.0
"""Inches; a picture with more rows has them closer together."""


def heat_map(diffs: Sequence[TensorDiff]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return layers, the kinds of their tensors, and the share that changed of each.

    The layer is the first number in a name, with what stands before it if that is not the same
    everywhere (an encoder and a decoder); the kind is what follows it. Tensors without a layer are
    left out, unless none has one. Where a layer has no such tensor stands ``None``.
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
    """Return a heat map for a terminal: a row a layer, a column a kind.

    It is empty for one layer, and where nothing changed.
    """
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
    """Draw the heat map as a file of the kind that its suffix says; return its path.

    :class:`InvalidInputError` where no tensor can be compared.
    """
    layers, kinds, rows = heat_map(diffs)
    if not rows:
        raise InvalidInputError("there is no heat map of two that have no tensor in common")
    figure, axes = _canvas(
        min(_TALLEST, max(5.0, 0.5 * len(kinds) + 3)),
        min(_TALLEST, max(3.0, 0.28 * len(layers) + 2.5)),
    )
    percents = [[math.nan if s is None else 100 * s for s in row] for row in rows]
    image = axes.imshow(percents, aspect="auto", cmap="viridis", vmin=0)
    _name_ticks(axes.set_xticks, kinds, rotation=60, ha="right")
    _name_ticks(axes.set_yticks, layers)
    axes.set_ylabel("layer")
    figure.colorbar(image, label="weights changed, %")
    axes.set_title(_label(title), parse_math=False)
    return _save(figure, path)


def draw_lineage(
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[Base],
    refs: Mapping[str, str],
    path: PathLike,
) -> Path:
    """Draw checkpoints by step and branch, each joined to its parent; return the file's path.

    The area of a point tells its stored bytes. Those that a ref keeps are filled, with its name
    unless it is a timeline's own. Of few checkpoints the metrics are told, of many those of refs.
    """
    counted = any(checkpoint.step is None for checkpoint in checkpoints)
    steps = [number if counted else c.step or 0 for number, c in enumerate(checkpoints)]
    names, lanes = _lanes(checkpoints, steps)
    figure, axes = _canvas(11.0, min(_TALLEST, max(3.0, 0.6 * len(names) + 1.5)))
    at: dict[str, tuple[float, int]] = {
        c.id: (x, lanes[c.id]) for c, x in zip(checkpoints, steps, strict=True)
    }
    first, last = min(steps, default=0), max(steps, default=0)
    for base in bases:
        own = [lanes[c.id] for c in checkpoints if c.base == base.id]
        if not own:
            names.append("")
        lane = min(own, default=len(names) - 1)
        at[base.id] = first - max(1, 0.08 * (last - first)), lane
        axes.plot(*at[base.id], marker="s", color="0.4", zorder=2)
        _write(axes, f"base {base.id[:8]}", at[base.id], above=-17)
    # One line with gaps: thousands of lines take many seconds.
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
    for identity, text in _labels(checkpoints, refs)[:_MOST_LABELS]:
        _write(axes, text, at[identity])
    axes.set_xlabel("order" if counted else "step")
    axes.set_ylabel("branch")
    axes.margins(x=0.08)
    axes.set_ylim(-0.6, max(len(names), 1) - 0.2)
    _name_ticks(axes.set_yticks, names)
    axes.set_title(f"{len(checkpoints)} checkpoints; the largest point is {human(most)}")
    return _save(figure, path)


def _lanes(
    checkpoints: Sequence[Checkpoint], steps: Sequence[int]
) -> tuple[list[str], dict[str, int]]:
    """Return the names of the rows, and the row of each checkpoint.

    A branch of a timeline has one of its own. Of others a child goes on in the row of its parent,
    or in another one of the same base that is free from there on.
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
            goes_on = (at for at, (_, end, _) in ends.items() if end == checkpoint.parent)
            free = (
                at
                for at, (last, _, base) in ends.items()
                if last < step and base == checkpoint.base
            )
            lane = next(goes_on, next(free, None))
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
    """Return a checkpoint's timeline and branch, if it is a timeline's."""
    place = checkpoint.metadata.get("timeline")
    branch = place.get("branch") if isinstance(place, Mapping) else None
    if not isinstance(place, Mapping) or not isinstance(branch, int):
        return None
    return str(place.get("name", "")), branch


def _labels(checkpoints: Sequence[Checkpoint], refs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return what is written beside checkpoints, by id."""
    names: dict[str, list[str]] = {}
    for name, identity in sorted(refs.items()):
        if not name.startswith("timelines/"):
            names.setdefault(identity, []).append(name)
    labels = []
    for checkpoint in checkpoints:
        lines = [", ".join(names.get(checkpoint.id, ()))]
        if lines[0] or len(checkpoints) <= _METRICS_OF:
            lines.append(metrics_text(checkpoint.metrics))
        text = "\n".join(_label(line) for line in lines if line)
        if text:
            labels.append((checkpoint.id, text))
    return labels


def _write(axes: Any, text: str, place: tuple[float, float], *, above: int = 9) -> None:
    axes.annotate(
        text,
        place,
        xytext=(0, above),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        parse_math=False,
        zorder=4,
    )


def _name_ticks(set_ticks: Callable[..., Any], names: Sequence[str], **how: Any) -> None:
    """Name rows or columns, of very many each second, third and so on."""
    every = math.ceil(len(names) / 150) or 1
    shown = range(0, len(names), every)
    set_ticks(list(shown), [_label(names[at]) for at in shown], parse_math=False, **how)


def _label(text: str) -> str:
    """Return text that any font has, on one line of a bounded length."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"


def _share(cell: tuple[int, int] | None) -> float | None:
    return None if cell is None else cell[0] / cell[1] if cell[1] else 0.0


def _shade(share: float | None, most: float) -> str:
    if share is None:
        return "·"
    if not share:
        return " "
    return _SHADES[max(1, min(len(_SHADES) - 1, math.ceil(share / most * (len(_SHADES) - 1))))]


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    try:
        # No window is wanted, and none of its state.
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise InvalidInputError(
            "drawing needs matplotlib, which is not installed: pip install 'msft-store[report]'"
        ) from None
    figure = figures.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: PathLike) -> Path:
    target = local_path(path)
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot draw {target}: {error}") from error
    return target
