"""The lineage of checkpoints as a tree of text: what ``msft-store inspect`` shows.

Example::

    print(lineage(store.log(), store.bases(), refs))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msft_store.bases import Base
from msft_store.manifest import Checkpoint
from msft_store.render import human, percent, short_path, table

_HEADER = ("checkpoint", "step", "metrics", "logical", "stored", "ratio", "kept by")
_METRICS_SHOWN = 4
_DEEPEST = 16
"""Levels that are indented."""


def lineage(
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[Base],
    refs: Mapping[str, str],
) -> str:
    """Return one line a checkpoint, each below the one that it descends from.

    A checkpoint whose parent was forgotten stands below its base. What is deeper than a screen has
    room for is indented no further. An empty store gives no text.
    """
    known = {checkpoint.id for checkpoint in checkpoints}
    children: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        parent = checkpoint.parent if checkpoint.parent in known else checkpoint.base
        children.setdefault(parent, []).append(checkpoint)
    names: dict[str, list[str]] = {}
    for name, identity in sorted(refs.items()):
        names.setdefault(identity, []).append(name)
    rows: list[tuple[str, ...]] = []
    for base in bases:
        size, path = human(base.logical_bytes), short_path(base.path)
        rows.append((f"base {base.id[:12]}", "", "", size, "", "", path))
        rows += _rows(children.get(base.id, []), children, names)
    if None in children:
        rows.append(("no base", "", "", "", "", "", ""))
        rows += _rows(children[None], children, names)
    return table(_HEADER, rows, align="<><>>><") if rows else ""


def _rows(
    top: Sequence[Checkpoint],
    children: Mapping[str | None, Sequence[Checkpoint]],
    names: Mapping[str, Sequence[str]],
) -> Iterator[tuple[str, ...]]:
    # A list of what is to come, because a run may be a chain of thousands.
    pending = _level(top, "")
    while pending:
        checkpoint, indent, last = pending.pop()
        yield (
            f"{indent}{'└─' if last else '├─'} {checkpoint.id[:12]}",
            "" if checkpoint.step is None else str(checkpoint.step),
            metrics_text(checkpoint.metrics),
            human(checkpoint.logical_bytes),
            human(checkpoint.stored_bytes),
            percent(checkpoint.stored_bytes, checkpoint.logical_bytes),
            ", ".join(_short(name) for name in names.get(checkpoint.id, ())),
        )
        deeper = indent + ("   " if last else "│  ")
        pending += _level(children.get(checkpoint.id, []), deeper[: len("│  ") * _DEEPEST])


def _level(checkpoints: Sequence[Checkpoint], indent: str) -> list[tuple[Checkpoint, str, bool]]:
    """Return siblings, the last first, with their indent and whether each is the last."""
    found = [(c, indent, at == len(checkpoints) - 1) for at, c in enumerate(checkpoints)]
    return found[::-1]


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return a few metrics on one line."""
    shown = [f"{name}={metrics[name]:.4g}" for name in sorted(metrics)]
    more = f" +{len(shown) - _METRICS_SHOWN}" if len(shown) > _METRICS_SHOWN else ""
    return " ".join(shown[:_METRICS_SHOWN]) + more


def _short(name: str) -> str:
    # A timeline names its refs by full id, which the line shows already.
    parts = name.split("/")
    return "/".join(parts[:-1]) if len(parts) > 1 and len(parts[-1]) == 32 else name
