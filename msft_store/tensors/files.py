"""Keep the files of a model, such as configuration and tokenizer, with its tensors.

A file PATH is a tensor of bytes named ``__files__/PATH`` (FORMAT.md, section 7), so equal files of
several checkpoints are stored once, and every file is verified like a tensor.

Invariants: no tensor of a caller has such a name. A name of a file stays inside the directory of
an export, and is not that of weights or of code.

Example::

    files = check_files({"config.json": b"{}"})
    store_state = {**state, **file_tensors(files)}
    weights, files = split_files(table)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch

from msft_store._util import format_bytes
from msft_store.errors import InvalidInputError
from msft_store.storage.backend import TEMPORARY

_T = TypeVar("_T")
PREFIX = "__files__/"
"""First part of the names of the tensors that hold files."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".msgpack", ".h5", ".gguf")
"""Ends of the names of files with weights."""
_MAX_NAME = 255
_MAX_TOTAL = 256 << 20
_PART = re.compile(r"[^./\\\0-\x1f\x7f\ud800-\udfff][^/\\\0-\x1f\x7f\ud800-\udfff]*")
"""A part of a path. Hidden files and names with control characters are excluded."""


def name_problem(name: object) -> str | None:
    """Return why a file cannot be kept under a name; ``None`` if it can."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= _MAX_NAME:
        return "is not a name of 1 to 255 bytes"
    parts = name.split("/")
    if not all(map(_PART.fullmatch, parts)) or parts[0] == TEMPORARY:
        return "is not a relative path of visible files"
    if name.lower().endswith(WEIGHTS):
        return "names weights; save them as tensors"
    if name.lower().endswith(".py"):
        return "is code; an export takes code from the base alone"
    return None


def check_files(files: object) -> dict[str, bytes]:
    """Return files by name as bytes; :class:`InvalidInputError` names one that cannot be kept."""
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise InvalidInputError(f"files must map names to bytes, not {str(files)[:80]!r}")
    for name, data in files.items():
        if not isinstance(data, bytes):
            raise InvalidInputError(f"the file {name!r} must be bytes, not {type(data).__name__}")
    check_sizes({name: len(data) for name, data in files.items()})
    return dict(files)


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise :class:`InvalidInputError` if files of these names and sizes cannot be kept."""
    for name in sizes:
        problem = name_problem(name)
        if problem is not None:
            raise InvalidInputError(f"the file {str(name)[:80]!r} cannot be kept: it {problem}")
        folders = [name[:at] for at, letter in enumerate(name) if letter == "/"]
        if folder := next((one for one in folders if one in sizes), None):
            raise InvalidInputError(f"{folder!r} is a file, and the folder of {name!r}")
    total = sum(sizes.values())
    if total > _MAX_TOTAL:
        raise InvalidInputError(
            f"the files have {format_bytes(total)}; a checkpoint holds at most "
            f"{format_bytes(_MAX_TOTAL)} besides its tensors"
        )


def file_tensors(files: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Return the tensors that hold files."""
    return {
        PREFIX + name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
        for name, data in files.items()
    }


def split_files(table: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """Return the tensors of a table without the files, and the files by their own names."""
    weights = {name: entry for name, entry in table.items() if not name.startswith(PREFIX)}
    files = {
        name.removeprefix(PREFIX): entry for name, entry in table.items() if name.startswith(PREFIX)
    }
    return weights, files
