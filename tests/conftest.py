"""Settings of every test: one thread for torch, and safe use of threads in forked processes.

Tests run beside each other, one on each core; more threads would only wait for each other. Compiled
loops run where a test expects them, not as soon as another process has compiled them.

A forked child must create a new thread pool at its first use. Two threads that do this at once, as
those that load a model do, can fail with "Invalid thread pool!", so each child does it once while
it has one thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("MSFT_STORE_NUMBA", "1")

import pytest
import torch

os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Remove the log handlers that a command installed, which would print in later tests too."""
    loggers = [logging.getLogger(name) for name in ("msft_store", "trainer")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
