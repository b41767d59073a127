"""Parse JSON from an untrusted writer: no duplicate keys, and every field of its declared type.

A digest shows that a file is as it was written, not that its writer meant well. Every function
raises :class:`ValueError` for an unexpected value.

Example::

    entry = parse(b'{"shape":[2,3]}')
    check_shape(check_object(entry)["shape"])              # (2, 3)
"""

from __future__ import annotations

import json
import re
from typing import Any

NUMBER_LIMIT = 1 << 63
"""Every number is smaller than this."""
MAX_DIMENSIONS = 64
MAX_NAME = 4096
"""Largest number of characters in a tensor's name."""
_MAX_NESTING = 64
_IDENTITY = re.compile("[0-9a-f]{32}")


def parse(data: bytes, encoding: str = "ascii") -> Any:
    """Parse a JSON document; :class:`ValueError` if an object has a key twice."""
    try:
        return json.loads(data.decode(encoding), object_pairs_hook=_reject_duplicate_keys)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def check_object(value: Any) -> dict[str, Any]:
    """Return the value if it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{_abbreviate(value)} is not an object")
    return value


def check_shallow_object(value: Any) -> dict[str, Any]:
    """Return the value if it is an object that is nested at most 64 levels deep.

    It may hold any content, but a key that is not a string would be read back as one.
    """
    level: list[Any] = [check_object(value)]
    depth = 0
    while level:
        depth += 1
        if depth > _MAX_NESTING:
            raise ValueError(f"an object is nested deeper than {_MAX_NESTING} levels")
        for key in (key for one in level if isinstance(one, dict) for key in one):
            if not isinstance(key, str):
                raise ValueError(f"the key {_abbreviate(key)} is not a string")
        inner = (c for one in level for c in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inner if isinstance(child, dict | list | tuple)]
    return check_object(value)


def check_strings(value: Any) -> tuple[str, ...]:
    """Return the value if it is a list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{_abbreviate(value)} is not a list of strings")
    return tuple(value)


def check_string(value: Any) -> str:
    """Return the value if it is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{_abbreviate(value)} is not a string")
    return value


def check_tensor_name(value: Any) -> str:
    """Return the value if it is a valid tensor name."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or "\0" in value:
        raise ValueError(f"{_abbreviate(value)} cannot be the name of a tensor")
    return value


def check_id(value: Any) -> str:
    """Return the value if it is an id: 32 lower-case hex digits."""
    if not isinstance(value, str) or not _IDENTITY.fullmatch(value):
        raise ValueError(f"{_abbreviate(value)} is not an id")
    return value


def check_natural(value: Any) -> int:
    """Return the value if it is an integer from 0 up below :data:`NUMBER_LIMIT`, not a bool."""
    if type(value) is not int or not 0 <= value < NUMBER_LIMIT:
        raise ValueError(f"{_abbreviate(value)} is not a natural number")
    return value


def check_shape(value: Any) -> tuple[int, ...]:
    """Return the value as a tuple if it is a shape, or an offset in one."""
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        raise ValueError(f"{_abbreviate(value)} is not a shape")
    return tuple(check_natural(item) for item in value)


def _abbreviate(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return shown if len(shown) <= 80 else f"{shown[:80]}…"
