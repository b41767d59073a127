"""The public names and their types. :mod:`lazy_loader` imports a name when it is first used."""

from .api import RunResult, resume, run
from .comparison.compare import compare
from .comparison.results import Comparison
from .config.load import load_config
from .config.schema import Config
from .errors import ConfigError, DataError, PausedError, RunError, TrainerError

__all__ = [
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "PausedError",
    "RunError",
    "RunResult",
    "TrainerError",
    "compare",
    "load_config",
    "resume",
    "run",
]
