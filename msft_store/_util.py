"""How numbers and tables are shown to people.

Example::

    human(1_900_000)                        # "1.9 MB"
    table(("name", "bytes"), [("w", human(512))], align="<>")

Paths as users give them: checked where they come in, so that no call below meets a bad one.

Example::

    local_path("runs/store")                # an absolute Path
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
    """Return a path as an absolute one.

    :class:`InvalidInputError` for what no file can be called: a path with a NUL character; and for
    a URL, which would become a directory here.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InvalidInputError(f"no path has a NUL character in it, as {text!r} has")
    if _URL.match(text):
        raise InvalidInputError(
            f"{text!r} is no directory of this machine: a store on a URL is read, and one that is "
            "here is pushed to it, pulled or cloned from it"
        )
    return Path(text).absolute()


_UNITS = ("B", "kB", "MB", "GB")
_STEP = 1000


def format_bytes(size: int) -> str:
    """Return a number of bytes with a unit, powers of 1000."""
    value = float(size)
    for unit in _UNITS:
        if abs(value) < _STEP:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} TB"


def format_count(number: int, what: str) -> str:
    """Return a number of things: "1 pack", "2 packs"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def shorten_path(path: str) -> str:
    """Return a path as seen from the current directory, if it is below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def format_percent(part: int, whole: int) -> str:
    """Return a share, or a dash of nothing."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
    """Return aligned columns; ``align`` has ``<`` or ``>`` for each."""
    # A name may have line ends, and is one cell all the same.
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, align, widths, strict=True)
        return "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

    return "\n".join(line(row) for row in (header, *rows))
