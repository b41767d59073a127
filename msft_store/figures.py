"""Pictures of a store, drawn by matplotlib, which is optional (the extra ``report``).

Example::

    draw_changes(store.diff(a, b), "changes.png")
    draw_lineage(store.log(), store.bases(), store.refs(), "lineage.svg")
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msft_store.bases import Base
from msft_store.diff import TensorDiff
from msft_store.errors import InvalidInputError, StorageError
from msft_store.manifest import Checkpoint
from msft_store.paths import PathLike, local_path
from msft_store.render import human

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_SHADES = " ░▒▓█"


def heat_map(diffs: Sequence[TensorDiff]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Return layers, the kinds of their tensors, and the share that changed of each.

    The layer is the first number in a name, the kind is what follows it. Tensors without a layer
    are left out, unless none has one. Where a layer has no such tensor stands ``None``.
    """
    cells: dict[tuple[str, str], tuple[int, int]] = {}
    placed = [(_place(diff.name), diff) for diff in diffs if diff.kind in ("equal", "changed")]
    layered = [(place, diff) for place, diff in placed if place[0] != "-"]
    for place, diff in layered or placed:
        changed, elements = cells.get(place, (0, 0))
        cells[place] = changed + diff.changed, elements + diff.elements
    layers = sorted({layer for layer, _ in cells}, key=lambda n: (len(n), n))
    kinds = sorted({kind for _, kind in cells})
    rows = [[_share(cells.get((layer, kind))) for kind in kinds] for layer in layers]
    return layers, kinds, rows


def heat_text(diffs: Sequence[TensorDiff]) -> str:
    """Return a heat map for a terminal: a row a layer, a column a kind; empty for one layer."""
    layers, kinds, rows = heat_map(diffs)
    if len(layers) < 2:
        return ""
    most = max((share for row in rows for share in row if share is not None), default=0.0)
    lines = [f"share changed by layer, {_SHADES[1]} little to {_SHADES[-1]} {100 * most:.3g} %"]
    lines += [
        f"{layer:>5} |{''.join(2 * _shade(share, most) for share in row)}|"
        for layer, row in zip(layers, rows, strict=True)
    ]
    return "\n".join([*lines, f"columns: {', '.join(kinds)}"])


def draw_changes(diffs: Sequence[TensorDiff], path: PathLike, *, title: str = "") -> Path:
    """Draw the heat map as a file of the kind that its suffix says; return its path."""
    layers, kinds, rows = heat_map(diffs)
    figure, axes = _canvas(max(5.0, 0.5 * len(kinds) + 3), max(3.0, 0.28 * len(layers) + 2.5))
    percents = [[math.nan if s is None else 100 * s for s in row] for row in rows]
    image = axes.imshow(percents, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    figure.colorbar(image, label="weights changed, %")
    axes.set_title(title)
    return _save(figure, path)


def draw_lineage(
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[Base],
    refs: Mapping[str, str],
    path: PathLike,
) -> Path:
    """Draw checkpoints by step and branch, each joined to its parent; return the file's path.

    The area of a point tells its stored bytes; those that a ref keeps are filled.
    """
    rows = _rows(checkpoints)
    figure, axes = _canvas(9.0, max(3.0, 0.4 * (max(rows.values(), default=0) + 1) + 2))
    most = max((checkpoint.stored_bytes for checkpoint in checkpoints), default=0) or 1
    at = {c.id: (_step(c, number), rows[c.id]) for number, c in enumerate(checkpoints)}
    start = min((x for x, _ in at.values()), default=0)
    for base in bases:
        at[base.id] = (start - 1, 0)
        axes.annotate(f"base {base.id[:8]}", at[base.id], xytext=(0, 8), textcoords="offset points")
    pinned = set(refs.values())
    for checkpoint in checkpoints:
        x, y = at[checkpoint.id]
        parent = at.get(checkpoint.parent or "")
        if parent is not None:
            axes.plot((parent[0], x), (parent[1], y), color="0.7", linewidth=1, zorder=1)
        size = 20 + 180 * checkpoint.stored_bytes / most
        face = "tab:blue" if checkpoint.id in pinned else "white"
        axes.scatter([x], [y], s=size, facecolor=face, edgecolor="tab:blue", zorder=2)
    axes.set_xlabel("step")
    axes.set_ylabel("branch")
    axes.set_yticks(sorted(set(rows.values())))
    axes.set_title(f"{len(checkpoints)} checkpoints; the largest point is {human(most)}")
    return _save(figure, path)


def _place(name: str) -> tuple[str, str]:
    found = _NUMBER.search(name)
    if found is None:
        return "-", name
    return found[1], name[found.end(0) :]


def _share(cell: tuple[int, int] | None) -> float | None:
    return None if cell is None else cell[0] / cell[1] if cell[1] else 0.0


def _shade(share: float | None, most: float) -> str:
    if share is None:
        return "·"
    if not share:
        return " "
    return _SHADES[max(1, min(len(_SHADES) - 1, math.ceil(share / most * (len(_SHADES) - 1))))]


def _step(checkpoint: Checkpoint, number: int) -> int:
    return number if checkpoint.step is None else checkpoint.step


def _rows(checkpoints: Sequence[Checkpoint]) -> dict[str, int]:
    """Return the row of each checkpoint: its branch, in a timeline, or how deep it stands."""
    depth: dict[str, int] = {}
    for checkpoint in checkpoints:
        place = checkpoint.metadata.get("timeline")
        branch = place.get("branch") if isinstance(place, Mapping) else None
        above = depth.get(checkpoint.parent or "", -1) + 1
        depth[checkpoint.id] = branch if isinstance(branch, int) else above
    return depth


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
