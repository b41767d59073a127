"""A run's directory: the names in it, its beginning, and the lock of who works in it.

Example::

    create_directory(config)
    with locked(Path(config.output_dir), writes=True):
        ...
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.config.load import dump
from trainer.config.schema import Config
from trainer.distributed import this_process
from trainer.errors import RunError
from trainer.files import make_directory, write_atomic

CONFIG, JOURNAL, STORE, RESUME, RESUME_STORE, MODEL, LOCK = (
    "config.yaml",
    "journal.jsonl",
    "store",
    "resume.safetensors",
    "resume",
    "model",
    "lock",
)

COMPARISON = "compare.*"
"""What a comparison writes into the directory that its runs are in."""


def create_directory(config: Config) -> None:
    """Make the run directory and write ``config.yaml`` into it, in the main process.

    Raises :class:`RunError` if a run is there already.
    """
    directory = Path(config.output_dir)
    state = this_process()
    if not state.is_main_process:
        state.wait_for_everyone()
        return
    if (directory / CONFIG).exists() or (directory / JOURNAL).exists():
        raise RunError(
            f"there is a run in {directory} already: continue it with `msft-train resume "
            f"{directory}`, or choose another output_dir"
        )
    if any(directory.glob(COMPARISON)):
        raise RunError(
            f"{directory} has a comparison of several runs: choose another output_dir, with "
            "output_dir=… on the command line"
        )
    for name in (STORE, MODEL):
        if (directory / name).exists():
            raise RunError(
                f"{directory / name} is there already and belongs to no run, which would replace "
                "it: move it away, or choose another output_dir"
            )
    make_directory(directory)
    write_atomic(directory / CONFIG, dump(config).encode())
    state.wait_for_everyone()


def withdraw_directory(config: Config) -> None:
    """Undo :func:`create_directory` where the run never began, in the main process.

    So a mistake in the configuration or the data is corrected, and the same command given again.
    """
    directory = Path(config.output_dir)
    journal = directory / JOURNAL
    if not this_process().is_main_process or (journal.exists() and journal.stat().st_size):
        return
    shutil.rmtree(directory / STORE, ignore_errors=True)
    for name in (JOURNAL, LOCK, CONFIG):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):  # it was there before, with something in it
        directory.rmdir()


@contextmanager
def locked(directory: Path, writes: bool) -> Iterator[None]:
    """Hold the run directory's lock, so that no second process writes in it."""
    if not writes:
        yield
        return
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is at work in {directory}; wait until it ends"
            ) from None
        yield
