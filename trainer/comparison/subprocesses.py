"""Run several ``msft-train`` commands at the same time, each in a process of its own.

A signal that ends this process is forwarded to all of them, and no further one is started. Their
stderr is kept until they end; its last line is the sentence that explains a failure.

Example::

    commands = {"sft": ["run", "sft.yaml"], "msft": ["run", "msft.yaml"]}
    run_subprocesses(commands, jobs=2, on_exit=lambda name, code, line: code == 0)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from trainer.signals import Interrupted, Interrupts

OnExit = Callable[[str, int, str], bool]
"""Called with the name, exit code and last line of a command; returns true to start others."""

_PREFIX = "msft-train: "


_Child = tuple[subprocess.Popen[bytes], IO[bytes]]
"""A process and the file with its stderr."""


def run_subprocesses(
    commands: Mapping[str, Sequence[str]],
    *,
    jobs: int,
    on_exit: OnExit,
    on_start: Callable[[str], None] = lambda name: None,
) -> None:
    """Run ``msft-train`` with the arguments of each named command, ``jobs`` at a time.

    The processor's cores are divided among the subprocesses. Raises :class:`Interrupted` after a
    signal, once all have ended.
    """
    waiting = list(commands)
    running: dict[str, _Child] = {}
    with Interrupts() as interrupts:
        is_forwarded = False
        try:
            while running or (waiting and not is_forwarded):
                if interrupts.number is not None and not is_forwarded:
                    is_forwarded = True
                    _send_signal(running, interrupts.number)
                while waiting and len(running) < jobs and not is_forwarded:
                    name = waiting.pop(0)
                    running[name] = _start(commands[name], jobs)
                    on_start(name)
                time.sleep(0.05)
                for name in [n for n, (one, _) in running.items() if one.poll() is not None]:
                    process, stderr = running.pop(name)
                    if not on_exit(name, process.returncode, _read_last_line(stderr)):
                        waiting.clear()
        finally:
            # After a second signal or an error nothing waits for the remaining subprocesses.
            _send_signal(running, signal.SIGTERM)
    if interrupts.number is not None:
        raise Interrupted(interrupts.number)


def _start(arguments: Sequence[str], jobs: int) -> _Child:
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its last line is read
    threads = max(1, (os.cpu_count() or 1) // jobs)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
        # A terminal sends Ctrl-C to the whole process group, so each would get the signal twice.
        start_new_session=True,
    )
    return process, stderr


def _send_signal(running: Mapping[str, _Child], number: int) -> None:
    for process, _ in running.values():
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _read_last_line(stderr: IO[bytes]) -> str:
    with stderr:
        stderr.seek(0)
        lines = [line for line in stderr.read().decode(errors="replace").splitlines() if line]
    messages = [line for line in lines if line.startswith(_PREFIX)] or lines
    return messages[-1].removeprefix(_PREFIX).strip() if messages else ""
