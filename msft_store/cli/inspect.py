"""``msft-store inspect``: show a whole store, a checkpoint or a base.

Example::

    document, text = inspect(store, options)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from typing import Any

from msft_store._util import format_bytes, format_percent, format_shape, format_table
from msft_store.cli.lineage import lineage
from msft_store.cli.output import format_base, format_checkpoint, format_missing_bases
from msft_store.cli.plots import draw_lineage
from msft_store.errors import InvalidInputError, UnknownCheckpointError
from msft_store.objects.bases import Base, has_missing_files
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store


def inspect(store: Store, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Show a checkpoint, a base or the lineage of the store; draw the lineage with --plot."""
    if options.checkpoint is None:
        return _inspect_store(store, options.plot)
    if options.plot is not None:
        raise InvalidInputError("--plot draws the whole lineage: leave the checkpoint out")
    try:
        return _inspect_checkpoint(store, store.get(options.checkpoint))
    except UnknownCheckpointError:
        with contextlib.suppress(UnknownCheckpointError):
            return _inspect_base(store.base(options.checkpoint))
        raise


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of a checkpoint that ``--json`` prints."""
    document = dataclasses.asdict(checkpoint)
    del document["tensor_digest"]
    document["metrics"] = {
        name: value if math.isfinite(value) else str(value)
        for name, value in checkpoint.metrics.items()
    }
    return document


def _inspect_store(store: Store, plot: str | None) -> tuple[dict[str, Any], str]:
    checkpoints, refs, bases, held = store.log(), store.refs(), store.bases(), store.held_bytes()
    manifests = store.manifest_bytes()
    document: dict[str, Any] = {
        "bases": [_summary_of_base(base) for base in bases],
        "checkpoints": [summary(checkpoint) for checkpoint in checkpoints],
        "refs": refs,
        "held_bytes": held,
        "manifest_bytes": manifests,
    }
    text = lineage(checkpoints, bases, refs, store.notes()) or "the store is empty"
    text += format_missing_bases(bases)
    if manifests:
        text += f"\nplus {format_bytes(manifests)} of manifests"
    if held:
        text += f"\nplus {format_bytes(held)} of forgotten checkpoints that others still need"
    if plot is not None:
        path = draw_lineage(checkpoints, bases, refs, plot)
        document["plot"] = str(path)
        text += f"\nthe lineage is drawn in {path}"
    return document, text


def _inspect_checkpoint(store: Store, checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    # Its chunks may have been re-encoded since the save that recorded its stored bytes.
    stored = store.encoded_bytes([checkpoint]).get(checkpoint.id, checkpoint.stored_bytes)
    checkpoint = dataclasses.replace(checkpoint, stored_bytes=stored)
    tensors = store.sources(checkpoint)
    rows = [
        (
            source.tensor,
            source.dtype,
            format_shape(source.shape),
            format_bytes(source.logical_bytes),
            format_bytes(source.stored_bytes),
            format_percent(source.stored_bytes, source.logical_bytes),
            "; ".join(source.how),
        )
        for source in tensors
    ]
    header = ("tensor", "dtype", "shape", "logical", "stored", "ratio", "kept as")
    text = (
        f"{format_checkpoint(store, checkpoint)}\n\n{format_table(header, rows, align='<<<>>><')}"
    )
    files = {name: len(data) for name, data in store.files(checkpoint).items()}
    if files:
        size = format_bytes(sum(files.values()))
        text += f"\n\nfiles that an export writes ({size}): {', '.join(files)}"
    sizes = {"manifest_bytes": store.manifest_bytes(checkpoint)}
    return {**summary(checkpoint), **sizes, "tensors": tensors, "files": files}, text


def _inspect_base(base: Base) -> tuple[dict[str, Any], str]:
    tensors = [
        {
            "tensor": name,
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "logical_bytes": tensor.nbytes,
            "file": base.files[tensor.file][0],
        }
        for name, tensor in base.tensors.items()
    ]
    rows = [
        (name, tensor.dtype.name, format_shape(tensor.shape), format_bytes(tensor.nbytes))
        for name, tensor in base.tensors.items()
    ]
    listed = format_table(("tensor", "dtype", "shape", "bytes"), rows, align="<<<>")
    return {**_summary_of_base(base), "tensors": tensors}, f"{format_base(base)}\n\n{listed}"


def _summary_of_base(base: Base) -> dict[str, Any]:
    return {
        "id": base.id,
        "path": base.path,
        "logical_bytes": base.logical_bytes,
        "gone": has_missing_files(base),
    }
