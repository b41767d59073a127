"""Check paths that a user gives, and format sizes and tables for people.

Paths are checked where they come in, so that no call below has to.

Example::

    check_path("runs/store")                # an absolute Path
    format_bytes(1_900_000)                 # "1.9 MB"
    format_table(("name", "bytes"), [("w", format_bytes(512))], align="<>")
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from msft_store.errors import InvalidInputError

PathLike = str | os.PathLike[str]
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")


def check_path(path: PathLike) -> Path:
    """Return the absolute path; :class:`InvalidInputError` for a NUL character or a URL.

    A URL would silently become a local directory of that name.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InvalidInputError(f"a path cannot contain a NUL character: {text!r}")
    if _URL.match(text):
        raise InvalidInputError(
            f"{text!r} is a URL, not a local directory: use push, pull or clone for a store on a "
            "URL, or open it read-only"
        )
    return Path(text).absolute()


def format_bytes(size: int) -> str:
    """Return a number of bytes with a decimal unit (powers of 1000)."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, as in "1 pack" or "2 packs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shorten_path(path: str) -> str:
    """Return a path relative to the current directory, if it is below that."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def format_percent(part: int, whole: int) -> str:
    """Return a share in percent, or a dash if the whole is 0."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape as in "512x192", or "scalar"."""
    return "x".join(map(str, shape)) or "scalar"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
    """Return aligned columns; ``align`` holds ``<`` or ``>`` for each column."""
    # A tensor name may contain line ends, which would break the row.
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, align, widths, strict=True)
        return "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

    return "\n".join(line(row) for row in (header, *rows))
