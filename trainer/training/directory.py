"""Create a run's directory, name its files, and lock it.

Example::

    with new_directory(config), hold_lock(Path(config.output_dir)):
        ...
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msft_store import StoreError
from trainer.config.load import dump
from trainer.config.schema import Config
from trainer.distributed import this_process
from trainer.errors import ConfigError, DataError, PausedError, RunError
from trainer.files import make_directory, write_atomic

CONFIG, JOURNAL, STORE, RESUME, RESUME_STORE, MODEL, PREDICTIONS, LOCK = (
    "config.yaml",
    "journal.jsonl",
    "store",
    "resume.safetensors",
    "resume",
    "model",
    "predictions",
    "lock",
)

COMPARISON = "compare.*"
"""Pattern of the files that a comparison writes into the parent directory of its runs."""


@contextmanager
def new_directory(config: Config) -> Iterator[None]:
    """Create the run directory, and delete it if an error occurs before the run has begun.

    The user can then correct the configuration or the data and repeat the same command. Raises
    :class:`RunError` if there is a run already, or no room on the disk to begin one.
    """
    try:
        create_directory(config)
        yield
    except (ConfigError, DataError, StoreError):
        _delete_unbegun(config)
        raise
    except PausedError as error:
        _delete_unbegun(config)
        if (Path(config.output_dir) / CONFIG).exists():
            raise
        raise RunError(f"the run did not begin: {error.__cause__ or error}") from error


def create_directory(config: Config) -> None:
    """Create the run directory and write ``config.yaml`` into it, in the main process.

    Raises :class:`RunError` if there is already a run.
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
            f"{directory} has a comparison of several runs: choose another output_dir, for "
            "example with output_dir=… on the command line"
        )
    for name in (STORE, MODEL):
        if (directory / name).exists():
            raise RunError(
                f"{directory / name} exists but belongs to no run, and a run would replace it: "
                "move it away, or choose another output_dir"
            )
    make_directory(directory)
    write_atomic(directory / CONFIG, dump(config).encode())
    state.wait_for_everyone()


def _delete_unbegun(config: Config) -> None:
    """Delete the files of a run that has no journal record, in the main process."""
    directory = Path(config.output_dir)
    journal = directory / JOURNAL
    if not this_process().is_main_process or (journal.exists() and journal.stat().st_size):
        return
    shutil.rmtree(directory / STORE, ignore_errors=True)
    for name in (JOURNAL, LOCK, CONFIG):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):  # the directory also holds files that are not the run's
        directory.rmdir()


@contextmanager
def hold_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of the run directory, so that no other run writes there; readers need none."""
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is running in {directory}: wait until it ends"
            ) from None
        yield
