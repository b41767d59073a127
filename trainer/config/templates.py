r"""Templates such as ``"Q: {question}\nA:"``, which make text of the columns of a row.

A placeholder ``{…}`` names a column. Dots lead to values in it: by key in objects, by index from 0
in lists (``{answers.text.0}``). Strings, numbers and booleans are written as Python writes them.
A filter after ``|`` converts other values to text:

- ``options``: a list, or several columns separated by commas, as ``A. first, B. second``. An item
  that begins with its own letter, as in ``A)first``, loses it;
- ``letter``: the number of an option, from 0, as its letter; a letter is not changed;
- ``letter1``: the same with numbers from 1.

``{{`` and ``}}`` are literal braces.

Example::

    render("{ending|options}: {label|letter}", {"ending": ["sat", "ran"], "label": "1"})
    # A. sat, B. ran: B
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from trainer.errors import DataError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LETTERS = string.ascii_uppercase


def check(template: str) -> None:
    """Raise :class:`DataError` for an invalid template."""
    for piece in _PIECE.finditer(template):
        if piece[0] in ("{", "}"):
            raise DataError(f"a single {piece[0]!r}; write it twice to have it in the text")
        if piece[1] is not None:
            _parse(piece[1])


def render(template: str, row: Mapping[str, Any]) -> str:
    """Return ``template`` with its placeholders replaced by values of ``row``.

    Raises :class:`DataError` for a column that is missing or empty, or that has the wrong type.
    """

    def fill(piece: re.Match[str]) -> str:
        if piece[1] is None:
            return piece[0][0]
        paths, name = _parse(piece[1])
        values = [_value(path, row) for path in paths]
        try:
            return _FILTERS[name](values[0] if len(values) == 1 else values)
        except DataError as error:
            raise DataError(f"column {', '.join(map(repr, paths))}: {error}") from None

    return _PIECE.sub(fill, template)


def _parse(placeholder: str) -> tuple[list[str], str]:
    """Return the paths of a placeholder and its filter's name."""
    names, bar, name = placeholder.partition("|")
    paths = [path.strip() for path in names.split(",")]
    name = name.strip()
    if not all(paths):
        raise DataError(f"{{{placeholder}}} names no column")
    if bar and not (name and name in _FILTERS):
        known = ", ".join(filter(None, _FILTERS))
        raise DataError(f"{{{placeholder}}}: there is no filter {name!r}, only {known}")
    if len(paths) > 1 and name != "options":
        raise DataError(f"{{{placeholder}}}: several columns need the filter options")
    return paths, name


def _value(path: str, row: Mapping[str, Any]) -> Any:
    """Return the value at a path; raises :class:`DataError` if it is missing or ``None``."""
    value: Any = row
    keys = path.split(".")
    for depth, key in enumerate(keys):
        here = repr(".".join(keys[:depth]))
        if isinstance(value, Mapping):
            if key not in value:
                what = "the row has the columns" if depth == 0 else f"{here} has the keys"
                raise DataError(f"there is no {key!r}; {what} {', '.join(map(str, value))}")
            value = value[key]
        elif isinstance(value, (list, tuple)) and key.isdecimal():
            if int(key) >= len(value):
                raise DataError(f"{here} has no item {key}, it has {len(value)}")
            value = value[int(key)]
        else:
            raise DataError(f"{here} is a {type(value).__name__}, so it has no {key!r}")
    if value is None:
        raise DataError(f"column {path!r} is empty")
    return value


def _text(value: Any) -> str:
    if isinstance(value, (str, bool, int, float)):
        return str(value)
    advice = "; name an item of it, or use |options" if isinstance(value, (list, tuple)) else ""
    raise DataError(f"a {type(value).__name__} is no text{advice}")


def _options(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= len(_LETTERS):
        raise DataError(f"not a list of 1 to {len(_LETTERS)} options")
    pairs = zip(_LETTERS, map(_text, value), strict=False)
    return ", ".join(f"{letter}. {text.removeprefix(f'{letter})')}" for letter, text in pairs)


def _letter(value: Any, *, first: int = 0) -> str:
    text = _text(value)
    if len(text) == 1 and text.upper() in _LETTERS:
        return text.upper()
    if text.isdecimal() and 0 <= int(text) - first < len(_LETTERS):
        return _LETTERS[int(text) - first]
    raise DataError(
        f"{text!r} is not the number of an option, from {first}, nor its letter; many data sets "
        "are published without the answers of their test split"
    )


_FILTERS: dict[str, Callable[[Any], str]] = {
    "": _text,
    "options": _options,
    "letter": _letter,
    "letter1": lambda value: _letter(value, first=1),
}
