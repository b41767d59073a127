"""Paths as users give them: checked where they come in, so that no call below meets a bad one.

Example::

    local_path("runs/store")                # an absolute Path
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from msft_store.errors import InvalidInputError

PathLike = str | os.PathLike[str]
_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")


def local_path(path: PathLike) -> Path:
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
