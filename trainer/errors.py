"""The trainer's exceptions.

TrainerError
├── ConfigError     the configuration is wrong: unknown key, value out of range, missing file
├── DataError       a data file or a line in it is wrong
└── RunError        a run directory is in use, incomplete, or of another version
    └── PausedError     the disk or max_disk has no room; the run can be resumed
"""


class TrainerError(Exception):
    """The base class of the exceptions of this package."""


class ConfigError(TrainerError):
    """The configuration is wrong."""


class DataError(TrainerError):
    """A data file or a line in it is wrong."""


class RunError(TrainerError):
    """A run directory cannot be used as asked."""


class PausedError(RunError):
    """A run found no room on the disk or within ``max_disk``; it can be resumed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class without one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
