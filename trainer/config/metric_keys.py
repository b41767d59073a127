"""The names of metrics in a configuration: built-in ones, and functions of the user.

A function is named ``module:function``. If the folder of the configuration has ``module.py``, or
the module is given as a path that ends in ``.py``, the name becomes the absolute path of that file,
so that a resume finds it. Any other module is imported from Python's path.

Example::

    resolve_metric("scores:rouge", Path("/home/me/run"))       # /home/me/run/scores.py:rouge
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError
from trainer.text import did_you_mean

BUILT_IN: Mapping[str, Literal["max", "min"]] = {
    "exact_match": "max",
    "loss": "min",
    "token_accuracy": "max",
}
"""The built-in metrics with their directions."""

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def resolve_metric(key: str, folder: Path, *, at: str) -> str:
    """Return the name of a metric, with an absolute path if a file has its function.

    ``folder`` is that of the configuration, ``at`` the dotted key of the metric. Raises
    :class:`ConfigError` if there is no such metric or file.
    """
    if key in BUILT_IN:
        return key
    module, colon, function = key.rpartition(":")
    is_file = module.endswith(".py")
    if not colon or not function.isidentifier() or not (is_file or _MODULE.fullmatch(module)):
        raise ConfigError(
            f"{at} must be one of {', '.join(BUILT_IN)}, or a function as module:function; got "
            f"{key!r}{did_you_mean(key, BUILT_IN)}"
        )
    file = folder / (module if is_file else f"{module}.py")
    if file.is_file():
        return f"{file.absolute()}:{function}"
    if is_file:
        raise ConfigError(f"{at}: there is no file {file} with the function {function!r}")
    return key
