"""How numbers and tables are shown to people.

Example::

    human(1_900_000)                        # "1.9 MB"
    table(("name", "bytes"), [("w", human(512))], align="<>")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_UNITS = ("B", "kB", "MB", "GB")
_STEP = 1000


def human(size: int) -> str:
    """Return a number of bytes with a unit, powers of 1000."""
    value = float(size)
    for unit in _UNITS:
        if abs(value) < _STEP:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} TB"


def counted(number: int, what: str) -> str:
    """Return a number of things: "1 pack", "2 packs"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def short_path(path: str) -> str:
    """Return a path as seen from the current directory, if it is below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def percent(part: int, whole: int) -> str:
    """Return a share, or a dash of nothing."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str) -> str:
    """Return aligned columns; ``align`` has ``<`` or ``>`` for each."""
    # A name may have line ends, and is one cell all the same.
    rows = [[cell.replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, align, widths, strict=True)
        return "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

    return "\n".join(line(row) for row in (header, *rows))
