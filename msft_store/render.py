"""How numbers and tables are shown to people."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB")
_STEP = 1000


def human(size: int) -> str:
    """Return a number of bytes with a unit, powers of 1000."""
    value = float(size)
    for unit in _UNITS:
        if abs(value) < _STEP or unit == _UNITS[-1]:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= _STEP
    raise AssertionError(size)


def percent(part: int, whole: int) -> str:
    """Return a share, or a dash of nothing."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return aligned columns: the first ``left`` to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in (header, *rows))
