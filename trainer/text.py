"""Tables and numbers as text: aligned columns for the terminal, Markdown for files.

Example::

    print(Table(header=("sub-dataset", "test"), rows=[("arith", "0.412")]).to_text())
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows and columns; the first column and words are aligned left, numbers right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True
    """True if the columns after the first hold numbers."""

    def to_text(self) -> str:
        """Return the table with aligned columns."""
        widths = self._widths()
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        header, *rows = ["  ".join(cells).rstrip() for cells in self._cells(widths)]
        return "\n".join([header, rule, *rows])

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        widths = [max(3, width) for width in self._widths()]
        end = ":" if self.numeric else "-"
        rules = ["-" * widths[0], *("-" * (width - 1) + end for width in widths[1:])]
        header, *rows = self._cells(widths)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))

    def _cells(self, widths: Sequence[int]) -> list[list[str]]:
        """Return header and rows, padded."""
        align = str.rjust if self.numeric else str.ljust
        return [
            [row[0].ljust(widths[0]), *map(align, row[1:], widths[1:])]
            for row in (self.header, *self.rows)
        ]

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]


def metric_text(value: float | None) -> str:
    """Return a metric with three decimals, or a dash for NaN and ``None``."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def metric_title(metric: str) -> str:
    """Return a metric's name in words; of a function in a file, without the file's folder."""
    module, colon, function = metric.rpartition(":")
    if not colon:
        return metric.replace("_", " ")
    return f"{module.rpartition('/')[2].removesuffix('.py')}:{function}"


def metric_name_text(metric: str, mode: str) -> str:
    """Return a metric's name and its direction, such as ``loss (lower is better)``."""
    direction = "higher" if mode == "max" else "lower"
    return f"{metric_title(metric)} ({direction} is better)"


def count_text(value: int) -> str:
    """Return a whole number with thousands separators."""
    return f"{value:,}"


def bytes_text(value: float) -> str:
    """Return bytes in a decimal unit."""
    return _with_unit(value, ("B", "kB", "MB", "GB", "TB"), digits=1)


def flops_text(value: int) -> str:
    """Return FLOPs in a unit that leaves at most three digits before the point."""
    units = ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs")
    return _with_unit(value, units, digits=2)


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units, such as ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _with_unit(value: float, units: Sequence[str], *, digits: int) -> str:
    """Return a value in the first unit that makes it less than 1000, or in the last one."""
    power = 0
    while abs(value) >= 1000 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.{digits if power else 0}f} {units[power]}"


def printable(text: str) -> str:
    """Return text with all characters escaped that are not visible, a space or a line end."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def too_long_text(name: str, count: int, max_length: int, end: str = "dropped") -> str:
    """Return a sentence that says how many examples of a sub-dataset were dropped, or cut."""
    examples = "1 example has" if count == 1 else f"{count} examples have"
    return f"sub-dataset {name!r}: {examples} more than data.max_length={max_length} tokens, {end}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the choice most like ``name``, or nothing."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
