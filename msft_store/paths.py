"""Paths as users give them: checked where they come in, so that no call below meets a bad one.

Example::

    local_path("runs/store")                # an absolute Path
"""

from __future__ import annotations

import os
from pathlib import Path

from msft_store.errors import InvalidInputError

PathLike = str | os.PathLike[str]


def local_path(path: PathLike) -> Path:
    """Return a path as an absolute one.

    :class:`InvalidInputError` for what no file can be called: a path with a NUL character.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InvalidInputError(f"no path has a NUL character in it, as {text!r} has")
    return Path(text).absolute()
