"""``msft-store diff``, ``average``, ``import`` and ``export``.

Example::

    document, text = diff(store, options)
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from msft_store._util import format_bytes, format_percent, format_shape, format_table
from msft_store.cli.import_ import find_matching_base, import_checkpoint
from msft_store.cli.plots import check_picture, draw_changes, heat_text
from msft_store.errors import InvalidInputError
from msft_store.maintenance.export_files import is_configured
from msft_store.maintenance.export_names import exported
from msft_store.objects.manifest import Checkpoint
from msft_store.objects.refs import check_ref_name
from msft_store.store import Store
from msft_store.tensors.matching import format_names

NO_PARENT = "none"
"""Value of ``--parent`` for a checkpoint without a parent."""


def diff(store: Store, options: argparse.Namespace) -> tuple[Any, str]:
    """Compare two checkpoints or bases; draw a heat map if a file is named."""
    one, other, plot = options.first, options.second, options.plot
    if plot is not None:
        check_picture(plot)
    diffs = store.diff(one, other)
    comparable = ("equal", "changed")
    both = [tensor for tensor in diffs if tensor.kind in comparable]
    changed = sum(tensor.changed for tensor in both)
    elements = sum(tensor.elements for tensor in both)
    differing = [tensor for tensor in diffs if tensor.kind != "equal"]
    rows = [
        (
            tensor.name,
            format_shape(tensor.shape),
            tensor.kind,
            format_percent(tensor.changed, tensor.elements) if tensor.kind in comparable else "",
            "" if tensor.largest is None else f"{tensor.largest:.3g}",
            format_bytes(tensor.stored_bytes),
        )
        for tensor in differing
    ]
    header = ("tensor", "shape", "", "changed", "largest", "stored")
    text = f"{format_table(header, rows, align='<<<>>>')}\n" if rows else ""
    text += (
        f"{len(differing)} of {len(diffs)} tensors differ, "
        f"{format_percent(changed, elements)} of the elements that both have"
    )
    picture = heat_text(diffs)
    text += f"\n\n{picture}" if picture else ""
    document = {
        "tensors": [{**dataclasses.asdict(t), "share": t.share} for t in diffs],
        "changed": changed,
        "elements": elements,
    }
    if plot is not None:
        title = f"{one[:12]} to {other[:12]}: {format_percent(changed, elements)} changed"
        path = draw_changes(diffs, plot, title=title)
        document["plot"] = str(path)
        text += f"\nthe heat map is in {path}"
    return document, text


def add_diff_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``diff``."""
    command.add_argument("first", help="a checkpoint, a ref or a base")
    command.add_argument("second", help="another one")
    command.add_argument(
        "--plot", metavar="FILE", help="draw a heat map over layers (.png, .svg, .pdf)"
    )


def add_average_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``average``."""
    command.add_argument("checkpoints", nargs="+", help="ids, unique prefixes of them, or refs")
    command.add_argument(
        "--weights",
        metavar="W,W,…",
        help="a number for each checkpoint; they are divided by their sum (default: all equal)",
    )
    command.add_argument("--ref", help="name of a ref that will point to it")


def average(store: Store, options: argparse.Namespace) -> tuple[Any, str]:
    """Save the weighted mean of checkpoints."""
    if options.ref is not None:
        check_ref_name(options.ref)
    saved = store.average(options.checkpoints, _weights(options.weights))
    if options.ref is not None:
        store.pin(saved, options.ref)
    text = _saved(saved)
    for source in saved.metadata["average"]:
        text += f"\n  {source['checkpoint'][:12]}  {source['weight']:.3g}"
    document = {
        "id": saved.id,
        "logical_bytes": saved.logical_bytes,
        "stored_bytes": saved.stored_bytes,
        "average": saved.metadata["average"],
        "ref": options.ref,
    }
    return document, text


def add_import_options(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`import_files` reads."""
    command.add_argument("path", help="a safetensors file, or a directory of them")
    command.add_argument(
        "--parent",
        help="the checkpoint, ref or base that it descends from; none stores it whole (default: "
        "the store's only base, if that has the same tensors)",
    )
    command.add_argument("--step", type=int, help="training step of the checkpoint")
    command.add_argument(
        "--metric", action="append", default=[], metavar="NAME=VALUE", help="a metric; repeatable"
    )
    command.add_argument("--tag", action="append", default=[], help="a tag; repeatable")
    command.add_argument("--ref", help="name of a ref that will point to it")


def import_files(store: Store, options: argparse.Namespace) -> tuple[Any, str]:
    """Save safetensors files as a checkpoint."""
    metrics = dict(_metric(text) for text in options.metric)
    if options.ref is not None:
        check_ref_name(options.ref)
    parent = options.parent
    if parent is None:
        parent = find_matching_base(store, options.path)
    elif parent == NO_PARENT:
        parent = None
    saved = import_checkpoint(
        store,
        options.path,
        parent=parent,
        step=options.step,
        metrics=metrics,
        tags=options.tag,
    )
    if options.ref is not None:
        store.pin(saved, options.ref)
    document = {
        "id": saved.id,
        "logical_bytes": saved.logical_bytes,
        "stored_bytes": saved.stored_bytes,
        "parent": saved.parent,
        "ref": options.ref,
    }
    text = _saved(saved)
    if options.parent is None and saved.parent is not None:
        text += f"\nit is stored as a difference from base {saved.parent[:12]}, which has the same "
        text += f"tensors; --parent {NO_PARENT} stores it whole"
    if options.parent is None and saved.parent is None and store.bases():
        text += "\nit is stored whole; --parent BASE_OR_CHECKPOINT stores only the differences"
    return document, text


def add_export_options(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`export_files` reads, after the checkpoint."""
    command.add_argument("directory", help="a new or empty directory")
    command.add_argument(
        "--like",
        metavar="DIRECTORY",
        help="a model directory to copy configuration and tokenizer from (default: the recorded "
        "ones and the base's)",
    )
    command.add_argument(
        "--layout",
        choices=("files", "memory"),
        help="names and shapes as in the files of the base, or as saved from memory (default: as "
        "in the files, where the checkpoint records how)",
    )


def export_files(store: Store, options: argparse.Namespace) -> tuple[Any, str]:
    """Write a checkpoint as a directory of safetensors files."""
    checkpoint = store.get(options.checkpoint)
    files = store.export(checkpoint, options.directory, like=options.like, layout=options.layout)
    text = "\n".join(map(str, files))
    tensors = store.tensors(checkpoint)
    base = None if checkpoint.base is None else store.base(checkpoint.base)
    chosen = exported(checkpoint, tensors, base)
    if chosen.left_out:
        size = format_bytes(sum(tensors[name].nbytes for name in chosen.left_out))
        text += f"\nleft out, as no part of the model: {format_names(chosen.left_out)} ({size})"
    configured = is_configured(files)
    if not configured:
        text += (
            "\nno configuration was written: none was saved with the checkpoint, and its base has "
            "none; --like DIRECTORY copies it from another model"
        )
    document = {
        "files": [str(file) for file in files],
        "configured": configured,
        "left_out": list(chosen.left_out),
    }
    return document, text


def _saved(checkpoint: Checkpoint) -> str:
    size = f"{format_bytes(checkpoint.stored_bytes)} for {format_bytes(checkpoint.logical_bytes)}"
    return f"checkpoint {checkpoint.id[:12]}: {size}"


def _weights(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError(f"--weights are numbers such as 0.7,0.3, not {text!r}") from None


def _metric(text: str) -> tuple[str, float]:
    name, sign, value = text.rpartition("=")
    try:
        if not (name and sign):
            raise ValueError
        return name, float(value)
    except ValueError:
        raise InvalidInputError(f"--metric is NAME=VALUE with a number, not {text!r}") from None
