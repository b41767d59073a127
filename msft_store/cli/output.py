"""Format and print the results of the ``msft-store`` command, safely for terminals.

Invariant: no text of a store reaches a terminal as a control character, because names, metrics and
notes may come from an untrusted source.

Example::

    print_text(printable(format_checkpoint(store, checkpoint)))
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

UNCHANGED = "nothing was changed (--dry-run)"


def printable(text: str) -> str:
    """Return text with all characters escaped that are not visible, a space or a line end."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def print_text(text: str) -> None:
    """Print text and flush it, so that an error of writing is raised here."""
    if sys.stdout is None:
        # The user closed stdout, so there is nowhere to print.
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class _StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, because tests and notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                print(printable(self.format(record)), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


def show_log(verbosity: int) -> None:
    """Show the store's log on stderr: warnings, from verbosity 1 also INFO, from 2 also DEBUG."""
    logger = logging.getLogger("msft_store")
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def to_json(document: Any) -> str:
    """Return a result as the text that ``--json`` prints."""
    return json.dumps(document, indent=2, default=dataclasses.asdict)


def discard_output() -> None:
    """Discard unprinted output, because the interpreter would try to print it again at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _format_fields(fields: Mapping[str, str]) -> str:
    """Return one line for each field; line ends in a value are escaped."""
    return "\n".join(f"{name:<13} {_one_line(value)}" for name, value in fields.items())


def format_checkpoint(store: Store, checkpoint: Checkpoint) -> str:
    """Return the metadata, sizes and refs of a checkpoint."""
    notes = store.notes()
    pins = [name for name, target in store.refs().items() if target == checkpoint.id]
    ratio = format_percent(checkpoint.stored_bytes, checkpoint.logical_bytes)
    metrics = sorted(checkpoint.metrics.items())
    text = _format_fields(
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
            "manifest": format_bytes(store.manifest_bytes(checkpoint)),
            "unreferenced": format_bytes(checkpoint.unreferenced_bytes),
            # Another process may have unpinned a ref since its name was read.
            "pins": "; ".join(_format_pin(name, notes.get(name, {})) for name in pins) or "none",
        }
    )
    return text + format_missing_bases(base for base in store.bases() if base.id == checkpoint.base)


def format_base(base: Base) -> str:
    """Return the metadata of a base and the state of its files."""
    state = "missing or shorter than recorded" if has_missing_files(base) else "present"
    size = format_bytes(sum(size for _, size in base.files))
    text = _format_fields(
        {
            "base": base.id,
            "path": base.path,
            "tensors": str(len(base.tensors)),
            "logical": format_bytes(base.logical_bytes),
            "files": f"{len(base.files)}, {size}, {state}",
        }
    )
    return text + format_missing_bases([base])


def format_stats(stats: Stats) -> str:
    """Return the statistics of a store."""
    share = format_percent(stats.stored_bytes, stats.logical_bytes)
    return _format_fields(
        {
            "checkpoints": str(stats.checkpoints),
            "logical": f"{format_bytes(stats.logical_bytes)} as full copies",
            "stored": f"{format_bytes(stats.stored_bytes)} in packs ({share})",
            "held": f"{format_bytes(stats.held_bytes)} of forgotten checkpoints that others are "
            "differences from",
            "manifests": format_bytes(stats.manifest_bytes),
            "on disk": f"{format_bytes(stats.on_disk_bytes)} in all files of the store",
            "quarantine": f"{format_bytes(stats.quarantine_bytes)} of these, moved by repairs",
            "bases": f"{format_bytes(stats.base_bytes)} outside the store",
            "chunks": f"{stats.chunks}, of which {stats.shared_chunks} shared",
        }
    )


def format_missing_bases(bases: Iterable[Base]) -> str:
    """Return a line for each base whose files are missing or too short."""
    return "".join(f"\n{format_missing_base(base)}" for base in bases if has_missing_files(base))


def format_missing_base(base: Base, consequence: str = "") -> str:
    """Return the line about a base whose files are missing, and about the consequence."""
    return (
        f"base {base.id[:12]} is no longer at {_one_line(base.path)}, or is shorter than recorded"
        f"{consequence and f', and {consequence}'}; if it moved: msft-store relocate "
        f"{base.id[:12]} NEW_PATH"
    )


def _format_pin(name: str, note: Mapping[str, object]) -> str:
    return f"{name}: {', '.join(reasons_of(note)) or 'pinned'}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")
