"""Format the lineage of checkpoints as a tree of text, for ``msft-store inspect``.

Example::

    print(lineage(store.log(), store.bases(), refs, store.notes()))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msft_store._util import format_bytes, format_percent, format_table, shorten_path
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.refs import TIMELINES

_HEADER = ("checkpoint", "step", "metrics", "logical", "stored", "ratio", "kept by")
_METRICS_SHOWN = 4
_DEEPEST = 16
"""Deepest level of the tree that is still indented."""
_REASONS_WIDTH = 60
"""Most characters for the reasons that keep a checkpoint; further reasons are counted."""


def lineage(
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[Base],
    refs: Mapping[str, str],
    notes: Mapping[str, Mapping[str, object]],
) -> str:
    """Return one line for each checkpoint, below its parent; no text for an empty store.

    A checkpoint whose parent was forgotten stands below its base. The last column shows the refs
    that keep a checkpoint, and the reasons in their notes; see :func:`kept_by`.
    """
    known = {checkpoint.id for checkpoint in checkpoints}
    children: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        parent = checkpoint.parent if checkpoint.parent in known else checkpoint.base
        children.setdefault(parent, []).append(checkpoint)
    reasons = kept_by(refs, notes)
    rows: list[tuple[str, ...]] = []
    for base in bases:
        size, path = format_bytes(base.logical_bytes), shorten_path(base.path)
        rows.append((f"base {base.id[:12]}", "", "", size, "", "", path))
        rows += _rows(children.get(base.id, []), children, reasons)
    if None in children:
        rows.append(("no base", "", "", "", "", "", ""))
        rows += _rows(children[None], children, reasons)
    return format_table(_HEADER, rows, align="<><>>><") if rows else ""


def _rows(
    top: Sequence[Checkpoint],
    children: Mapping[str | None, Sequence[Checkpoint]],
    reasons: Mapping[str, str],
) -> Iterator[tuple[str, ...]]:
    # Use a list instead of recursion, because a run may be a chain of thousands of checkpoints.
    pending = _level(top, "")
    while pending:
        checkpoint, indent, last = pending.pop()
        yield (
            f"{indent}{'└─' if last else '├─'} {checkpoint.id[:12]}",
            "" if checkpoint.step is None else str(checkpoint.step),
            format_metrics(checkpoint.metrics),
            format_bytes(checkpoint.logical_bytes),
            format_bytes(checkpoint.stored_bytes),
            format_percent(checkpoint.stored_bytes, checkpoint.logical_bytes),
            reasons.get(checkpoint.id, ""),
        )
        deeper = indent + ("   " if last else "│  ")
        pending += _level(children.get(checkpoint.id, []), deeper[: len("│  ") * _DEEPEST])


def _level(checkpoints: Sequence[Checkpoint], indent: str) -> list[tuple[Checkpoint, str, bool]]:
    """Return siblings in reverse order, each with its indent and with True for the last sibling."""
    found = [(c, indent, at == len(checkpoints) - 1) for at, c in enumerate(checkpoints)]
    return found[::-1]


def kept_by(refs: Mapping[str, str], notes: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return the refs that keep each checkpoint, and their reasons, on one line by id.

    A ref of a timeline is named only if no ref of the checkpoint has a reason.
    """
    names: dict[str, list[str]] = {}
    for name, identity in sorted(refs.items()):
        names.setdefault(identity, []).append(name)
    return {identity: _format_reasons(found, notes) for identity, found in names.items()}


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return the first metrics on one line, and the number of the others."""
    shown = [f"{name}={metrics[name]:.4g}" for name in sorted(metrics)]
    more = f" +{len(shown) - _METRICS_SHOWN}" if len(shown) > _METRICS_SHOWN else ""
    return " ".join(shown[:_METRICS_SHOWN]) + more


def reasons_of(note: Mapping[str, object]) -> list[str]:
    """Return the distinct reasons in a ref's note, which may hold any JSON."""
    reasons = note.get("reasons")
    return list(dict.fromkeys(map(str, reasons))) if isinstance(reasons, list) else []


def _format_reasons(names: Sequence[str], notes: Mapping[str, Mapping[str, object]]) -> str:
    # Another process may have unpinned a ref since its name was read.
    reasons = [reason for name in names for reason in reasons_of(notes.get(name, {}))]
    own = [name for name in names if not name.startswith(TIMELINES)]
    parts = list(dict.fromkeys([*own, *(reasons or ([] if own else map(_strip_id, names)))]))
    shown = 1
    while shown < len(parts) and len(", ".join(parts[: shown + 1])) <= _REASONS_WIDTH:
        shown += 1
    text = ", ".join(parts[:shown])
    text = text if len(text) <= _REASONS_WIDTH else f"{text[: _REASONS_WIDTH - 1]}…"
    return text + (f" +{len(parts) - shown}" if shown < len(parts) else "")


def _strip_id(name: str) -> str:
    # The name of a timeline's ref ends with the checkpoint's id, which the line shows already.
    parts = name.split("/")
    return "/".join(parts[:-1]) if len(parts) > 1 and len(parts[-1]) == 32 else name
