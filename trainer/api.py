"""Run the trainer from Python, as ``msft-train run`` and ``msft-train resume`` do.

``from trainer import run, resume, compare, load_config`` gives the whole interface. Errors are
exceptions instead of exit codes. Progress messages are records of the logger ``trainer``.

Example::

    from trainer import load_config, resume, run

    result = run(load_config("config.yaml", ["train.lr=2e-5"]))
    print(result.summary.overall.validation, result.model)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import Config
from trainer.report.summary import Summary
from trainer.training import run as runs
from trainer.training.directory import MODEL, STORE


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: The directory of the run. It has ``report.md``, ``result.json``, plots and the
            journal.
        summary: The numbers of the run: metrics of the base and of the result by sub-dataset,
            peaks, disk and work. ``summary.diverged`` is true if a divergence ended the run.
    """

    directory: Path
    summary: Summary

    @property
    def model(self) -> Path:
        """The resulting model, a Hugging Face directory."""
        return self.directory / MODEL

    @property
    def store(self) -> Path:
        """The directory of the run's checkpoint store, for :meth:`msft_store.Store.open`."""
        return self.directory / STORE


def run(config: Config, *, progress: bool = False) -> RunResult:
    """Begin a run in ``config.output_dir`` and train until it is finished.

    Args:
        config: The configuration, from :func:`load_config`.
        progress: Show progress bars on stderr.

    Returns:
        The finished run.

    Raises:
        ConfigError: The configuration does not fit the model or the data.
        DataError: A data file is wrong.
        RunError: The directory has a run already, or another process uses it.
        PausedError: The disk, or ``max_disk``, is full. :func:`resume` continues the run.
        ~trainer.signals.Interrupted: SIGINT or SIGTERM ended the run. :func:`resume` continues it.
    """
    return RunResult(
        directory=Path(config.output_dir), summary=runs.start(config, progress=progress)
    )


def resume(directory: str | os.PathLike[str], *, progress: bool = False) -> RunResult:
    """Continue a run that was interrupted, paused or killed. A finished run stays as it is.

    Args:
        directory: The directory of the run.
        progress: Show progress bars on stderr.

    Returns:
        The finished run.

    Raises:
        RunError: The directory has no run, another process uses it, or its model was changed.
        PausedError: The disk, or ``max_disk``, is still full.
        ~trainer.signals.Interrupted: SIGINT or SIGTERM ended the run again.
    """
    directory = Path(directory).absolute()
    return RunResult(directory=directory, summary=runs.resume(directory, progress=progress))
