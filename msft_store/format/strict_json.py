"""JSON that a stranger may have written: no key twice, and each field of the type that it has.

A digest says that a file is as it was written, not that its writer meant well. Everything here
raises :class:`ValueError`, and looks at no more than it was given.

Example::

    entry = parse(b'{"shape":[2,3]}')
    shape_of(mapping(entry)["shape"])              # (2, 3)
"""

from __future__ import annotations

import json
import re
from typing import Any

NUMBER_LIMIT = 1 << 63
"""Numbers are below it."""
MAX_DIMENSIONS = 64
MAX_NAME = 4096
"""Characters of a tensor's name."""
_MAX_NESTING = 64
_IDENTITY = re.compile("[0-9a-f]{32}")


def parse(data: bytes, encoding: str = "ascii") -> Any:
    """Return a JSON document in which no object has a key twice."""
    try:
        return json.loads(data.decode(encoding), object_pairs_hook=_reject_duplicate_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def check_object(value: Any) -> dict[str, Any]:
    """Return an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{_abbreviate(value)} is not an object")
    return value


def check_shallow_object(value: Any) -> dict[str, Any]:
    """Return an object that is free in what it holds, but nested no deeper than anybody needs."""
    level: list[Any] = [check_object(value)]
    depth = 0
    while level:
        depth += 1
        if depth > _MAX_NESTING:
            raise ValueError(f"an object is nested deeper than {_MAX_NESTING} levels")
        inner = (child for one in level for child in (one.values() if type(one) is dict else one))
        level = [child for child in inner if isinstance(child, dict | list)]
    return check_object(value)


def check_strings(value: Any) -> tuple[str, ...]:
    """Return a list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{_abbreviate(value)} is not a list of strings")
    return tuple(value)


def check_string(value: Any) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise ValueError(f"{_abbreviate(value)} is not a string")
    return value


def check_tensor_name(value: Any) -> str:
    """Return what may be a tensor's name."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or "\0" in value:
        raise ValueError(f"{_abbreviate(value)} cannot be the name of a tensor")
    return value


def check_id(value: Any) -> str:
    """Return an id."""
    if not isinstance(value, str) or not _IDENTITY.fullmatch(value):
        raise ValueError(f"{_abbreviate(value)} is not an id")
    return value


def check_natural(value: Any) -> int:
    """Return a natural number below :data:`NUMBER_LIMIT`; true is none."""
    if type(value) is not int or not 0 <= value < NUMBER_LIMIT:
        raise ValueError(f"{_abbreviate(value)} is not a natural number")
    return value


def check_shape(value: Any) -> tuple[int, ...]:
    """Return a shape, or an offset in one."""
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        raise ValueError(f"{_abbreviate(value)} is not a shape")
    return tuple(check_natural(item) for item in value)


def _abbreviate(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return shown if len(shown) <= 80 else f"{shown[:80]}…"
