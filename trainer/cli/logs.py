"""Show the log of both packages on the terminal.

By default the trainer's stages, decisions and resumes (INFO) are shown as bare messages.
``--quiet`` shows warnings only. ``-v`` adds the store's log and the names of the loggers, ``-vv``
details.

Example::

    show_log(quiet=options.quiet, verbosity=options.verbose)
"""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from trainer.distributed import this_process
from trainer.text import printable

_NAMED = "%(levelname)s %(name)s: %(message)s"


class TerminalHandler(logging.Handler):
    """Writes log lines to stderr without tearing progress bars; control characters are escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; INFO and DEBUG lines come from the main process only."""
        if record.levelno >= logging.WARNING or this_process().is_main_process:
            tqdm.write(printable(self.format(record)), file=sys.stderr)


def show_log(*, quiet: bool, verbosity: int) -> None:
    """Install one handler for the loggers ``trainer`` and ``msft_store``, and set their levels.

    ``verbosity`` is how often ``-v`` was given.
    """
    trainer_level = logging.DEBUG if verbosity > 1 else logging.INFO
    store_level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    for name, level in (("trainer", trainer_level), ("msft_store", store_level)):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if quiet else level)
        handlers = [one for one in logger.handlers if isinstance(one, TerminalHandler)]
        handler = handlers[0] if handlers else TerminalHandler()
        handler.setFormatter(logging.Formatter(_NAMED if verbosity else "%(message)s"))
        if not handlers:
            logger.addHandler(handler)
