"""A bar on stderr that shows how far a stage has come, where that is a terminal.

Example::

    with stage_bar(1, done=0, steps=80, shown=True) as bar:
        bar.update()
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def stage_bar(number: int, *, done: int, steps: int, shown: bool) -> Any:
    """Return a bar for stage ``number`` that stands at ``done`` of ``steps``."""
    return tqdm(
        desc=f"stage {number}",
        initial=done,
        total=steps,
        unit="step",
        leave=False,
        disable=not (shown and sys.stderr.isatty()),
    )
