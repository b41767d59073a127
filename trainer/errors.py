"""The trainer's exceptions; :class:`TrainerError` is the base class of all."""


class TrainerError(Exception):
    """The base class of the exceptions of this package."""


class ConfigError(TrainerError):
    """The configuration is wrong: unknown key, value out of range, missing file."""


class DataError(TrainerError):
    """A data file or a line in it is wrong."""


class RunError(TrainerError):
    """A run directory is in use, incomplete, or of another version."""


class PausedError(RunError):
    """A run found no room on the disk or within ``max_disk``; it can be resumed."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class without one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
