"""Render a self-contained HTML page of tables, text and SVG images, for light and dark mode.

All text is escaped. The page has no script and loads no other file.

Example::

    render_page("Comparison", ["Test loss, 3 seeds.", Section(title="C = 1", table=table)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.text import Table

_CSS = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1rem 0; } figcaption { max-width: 48rem; opacity: .8; }
svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table under a heading."""

    title: str
    table: Table


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot with its caption under a heading."""

    name: str
    """File name without its suffix."""
    title: str
    caption: str
    svg: str


def render_page(title: str, parts: Sequence[str | Section | Plot]) -> str:
    """Return the page as HTML; a string is a paragraph."""
    body = "\n".join(map(_render_part, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _render_part(part: str | Section | Plot) -> str:
    match part:
        case str():
            return f"<p>{escape(part)}</p>"
        case Section():
            table = _render_table(part.table)
            return f'<h2>{escape(part.title)}</h2>\n<div class="wide">{table}</div>'
        case Plot():
            caption = f"<figcaption>{escape(part.caption)}</figcaption>"
            return f"<h2>{escape(part.title)}</h2>\n<figure>{part.svg}{caption}</figure>"


def _render_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    kind = ' class="numbers"' if table.numeric else ""
    return f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
