"""What the ``msft-store`` command prints, made safe for terminals.

Invariant: nothing that a store holds reaches a terminal as a control character; names, metrics and
notes may be a stranger's.

Example::

    print_text(printable(facts(store, checkpoint)))
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from msft_store._util import format_bytes, format_percent
from msft_store.cli.lineage import reasons_of
from msft_store.maintenance.stats import Stats
from msft_store.objects.bases import Base, has_missing_files
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store

_HANDLER = "msft-store command"


def printable(text: str) -> str:
    """Return text with all that is neither visible nor a space or line end escaped."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def print_text(text: str) -> None:
    """Print text at once, so that an error of writing it is raised here."""
    if sys.stdout is None:
        # Whoever closed it wants nothing of it.
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def show_log(verbosity: int) -> None:
    """Show the store's log on stderr: warnings; INFO too from 1 on, DEBUG from 2 on."""
    logger = logging.getLogger("msft_store")
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    for handler in [one for one in logger.handlers if one.name == _HANDLER]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.name = _HANDLER
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)


def as_json(document: Any) -> str:
    """Return what ``--json`` prints."""
    return json.dumps(document, indent=2, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{value!r} has no JSON form")


def discard_output() -> None:
    """Throw away what could not be printed; else it is tried again when the interpreter ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listing(rows: Mapping[str, str]) -> str:
    """Return one line a fact; what stands in it does not begin another one."""
    return "\n".join(f"{name:<13} {_one_line(value)}" for name, value in rows.items())


def measured(store: Store, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with what it takes now, which is not always what its save took."""
    now = store.encoded_bytes([checkpoint])
    stored = now.get(checkpoint.id, checkpoint.stored_bytes)
    return dataclasses.replace(checkpoint, stored_bytes=stored)


def facts(store: Store, checkpoint: Checkpoint) -> str:
    """Return what a checkpoint says of itself."""
    notes = store.notes()
    pins = [name for name, target in store.refs().items() if target == checkpoint.id]
    ratio = format_percent(checkpoint.stored_bytes, checkpoint.logical_bytes)
    metrics = sorted(checkpoint.metrics.items())
    text = listing(
        {
            "checkpoint": checkpoint.id,
            "parent": checkpoint.parent or "none",
            "base": checkpoint.base or "none",
            "step": "none" if checkpoint.step is None else str(checkpoint.step),
            "metrics": " ".join(f"{k}={v:.6g}" for k, v in metrics) or "none",
            "tags": " ".join(checkpoint.tags) or "none",
            "metadata": json.dumps(checkpoint.metadata, sort_keys=True),
            "logical": format_bytes(checkpoint.logical_bytes),
            "stored": f"{format_bytes(checkpoint.stored_bytes)} ({ratio})",
            "unreferenced": format_bytes(checkpoint.unreferenced_bytes),
            # Others may pin and unpin while this looks.
            "pins": "; ".join(_pin(name, notes.get(name, {})) for name in pins) or "none",
        }
    )
    return text + describe_missing_files(
        base for base in store.bases() if base.id == checkpoint.base
    )


def facts_of_base(base: Base) -> str:
    """Return what is known of a base, and whether its files are where they were."""
    files = len(base.files)
    there = "not where they were, or too short" if has_missing_files(base) else "there"
    text = listing(
        {
            "base": base.id,
            "path": base.path,
            "tensors": str(len(base.tensors)),
            "logical": format_bytes(base.logical_bytes),
            "files": f"{files}, {format_bytes(sum(size for _, size in base.files))}, {there}",
        }
    )
    return text + describe_missing_files([base])


def counts(stats: Stats) -> str:
    """Return what is counted in a store."""
    share = format_percent(stats.stored_bytes, stats.logical_bytes)
    return listing(
        {
            "checkpoints": str(stats.checkpoints),
            "logical": f"{format_bytes(stats.logical_bytes)} as full copies",
            "stored": f"{format_bytes(stats.stored_bytes)} in packs ({share})",
            "held": f"{format_bytes(stats.held_bytes)}, of forgotten checkpoints that others are "
            "changes of",
            "on disk": f"{format_bytes(stats.on_disk_bytes)}, everything counted",
            "quarantine": f"{format_bytes(stats.quarantine_bytes)} of it, set aside by repairs",
            "bases": f"{format_bytes(stats.base_bytes)}, elsewhere on the disk",
            "chunks": f"{stats.chunks}, of which {stats.shared_chunks} shared",
        }
    )


def describe_missing_files(bases: Iterable[Base]) -> str:
    """Return a line for each base that checkpoints cannot be restored with as it is."""
    return "".join(f"\n{missing(base)}" for base in bases if has_missing_files(base))


def missing(base: Base, hence: str = "") -> str:
    """Return the line about a base that is gone, and what comes of that."""
    return (
        f"base {base.id[:12]} is no longer at {_one_line(base.path)}, or shorter than it was"
        f"{hence and f', and {hence}'}; if it moved: msft-store relocate {base.id[:12]} NEW_PATH"
    )


def _pin(name: str, note: Mapping[str, object]) -> str:
    return f"{name}: {', '.join(reasons_of(note)) or 'pinned'}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")
