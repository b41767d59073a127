"""The lineage of checkpoints as a tree of text: what ``msft-store inspect`` shows.

Example::

    print(lineage(store.log(), store.bases(), refs, store.notes()))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msft_store._util import format_bytes, format_percent, format_table, shorten_path
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint

_HEADER = ("checkpoint", "step", "metrics", "logical", "stored", "ratio", "kept by")
_METRICS_SHOWN = 4
_DEEPEST = 16
"""Levels that are indented."""
_WHY_SHOWN = 60
"""Characters of what keeps a checkpoint; what does not fit is counted."""


def lineage(
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[Base],
    refs: Mapping[str, str],
    notes: Mapping[str, Mapping[str, object]],
) -> str:
    """Return one line a checkpoint, each below the one that it descends from.

    A checkpoint whose parent was forgotten stands below its base. What is deeper than a screen has
    room for is indented no further. What keeps a checkpoint is told by the names of its refs and
    the reasons in their notes; a timeline's ref is named only where no reason is known. An empty
    store gives no text.
    """
    known = {checkpoint.id for checkpoint in checkpoints}
    children: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        parent = checkpoint.parent if checkpoint.parent in known else checkpoint.base
        children.setdefault(parent, []).append(checkpoint)
    why = kept_by(refs, notes)
    rows: list[tuple[str, ...]] = []
    for base in bases:
        size, path = format_bytes(base.logical_bytes), shorten_path(base.path)
        rows.append((f"base {base.id[:12]}", "", "", size, "", "", path))
        rows += _rows(children.get(base.id, []), children, why)
    if None in children:
        rows.append(("no base", "", "", "", "", "", ""))
        rows += _rows(children[None], children, why)
    return format_table(_HEADER, rows, align="<><>>><") if rows else ""


def _rows(
    top: Sequence[Checkpoint],
    children: Mapping[str | None, Sequence[Checkpoint]],
    why: Mapping[str, str],
) -> Iterator[tuple[str, ...]]:
    # A list of what is to come, because a run may be a chain of thousands.
    pending = _level(top, "")
    while pending:
        checkpoint, indent, last = pending.pop()
        yield (
            f"{indent}{'└─' if last else '├─'} {checkpoint.id[:12]}",
            "" if checkpoint.step is None else str(checkpoint.step),
            metrics_text(checkpoint.metrics),
            format_bytes(checkpoint.logical_bytes),
            format_bytes(checkpoint.stored_bytes),
            format_percent(checkpoint.stored_bytes, checkpoint.logical_bytes),
            why.get(checkpoint.id, ""),
        )
        deeper = indent + ("   " if last else "│  ")
        pending += _level(children.get(checkpoint.id, []), deeper[: len("│  ") * _DEEPEST])


def _level(checkpoints: Sequence[Checkpoint], indent: str) -> list[tuple[Checkpoint, str, bool]]:
    """Return siblings, the last first, with their indent and whether each is the last."""
    found = [(c, indent, at == len(checkpoints) - 1) for at, c in enumerate(checkpoints)]
    return found[::-1]


def kept_by(refs: Mapping[str, str], notes: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return what keeps each checkpoint that a ref points to, on one line, by id."""
    names: dict[str, list[str]] = {}
    for name, identity in sorted(refs.items()):
        names.setdefault(identity, []).append(name)
    return {identity: _why(found, notes) for identity, found in names.items()}


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return a few metrics on one line."""
    shown = [f"{name}={metrics[name]:.4g}" for name in sorted(metrics)]
    more = f" +{len(shown) - _METRICS_SHOWN}" if len(shown) > _METRICS_SHOWN else ""
    return " ".join(shown[:_METRICS_SHOWN]) + more


def reasons_of(note: Mapping[str, object]) -> list[str]:
    """Return the reasons that a ref's note gives, each once; a note is JSON of whoever wrote it."""
    reasons = note.get("reasons")
    return list(dict.fromkeys(map(str, reasons))) if isinstance(reasons, list) else []


def _why(names: Sequence[str], notes: Mapping[str, Mapping[str, object]]) -> str:
    # Others may pin and unpin while this looks.
    reasons = [reason for name in names for reason in reasons_of(notes.get(name, {}))]
    own = [name for name in names if not name.startswith("timelines/")]
    told = list(dict.fromkeys([*own, *(reasons or ([] if own else map(_short, names)))]))
    fitting = 1
    while fitting < len(told) and len(", ".join(told[: fitting + 1])) <= _WHY_SHOWN:
        fitting += 1
    text = ", ".join(told[:fitting])
    text = text if len(text) <= _WHY_SHOWN else f"{text[: _WHY_SHOWN - 1]}…"
    return text + (f" +{len(told) - fitting}" if fitting < len(told) else "")


def _short(name: str) -> str:
    # A timeline names its refs by full id, which the line shows already.
    parts = name.split("/")
    return "/".join(parts[:-1]) if len(parts) > 1 and len(parts[-1]) == 32 else name
