"""Several ``msft-train`` commands at once, each in a process of its own.

A signal that ends this process is passed on to all of them, and no further one is begun. What a
child says on stderr is kept until it ends; its last line is the sentence that explains a failure.

Example::

    run_children({"sft": ["run", "sft.yaml"], "msft": ["run", "msft.yaml"]}, at_once=2, ended=print)
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
from dataclasses import dataclass
from typing import IO

from trainer.signals import Interrupted, Interrupts

Ended = Callable[[str, int, str], bool]
"""Told a command's name, its exit code and its last line; returns whether to begin others."""

_PREFIX = "msft-train: "


@dataclass(frozen=True, kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]


def run_children(
    commands: Mapping[str, Sequence[str]],
    *,
    at_once: int,
    ended: Ended,
    begun: Callable[[str], None] = lambda name: None,
) -> None:
    """Run ``msft-train`` with the arguments of each command, ``at_once`` at a time.

    ``commands`` are by name. torch's threads are shared out among them. Raises
    :class:`Interrupted` once all have ended, where this process was told to end.
    """
    waiting = list(commands)
    running: dict[str, _Child] = {}
    with Interrupts() as interrupts:
        passed_on = False
        try:
            while running or (waiting and not passed_on):
                if interrupts.number is not None and not passed_on:
                    passed_on = True
                    _signal(running, interrupts.number)
                while waiting and len(running) < at_once and not passed_on:
                    name = waiting.pop(0)
                    running[name] = _begin(commands[name], at_once)
                    begun(name)
                time.sleep(0.05)
                for name in [n for n, child in running.items() if child.process.poll() is not None]:
                    child = running.pop(name)
                    if not ended(name, child.process.returncode, _last_line(child.stderr)):
                        waiting.clear()
        finally:
            # A second signal, or an error of ours: nobody waits for them any more.
            _signal(running, signal.SIGTERM)
    if interrupts.number is not None:
        raise Interrupted(interrupts.number)


def _begin(arguments: Sequence[str], at_once: int) -> _Child:
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its last line is read
    threads = max(1, (os.cpu_count() or 1) // at_once)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
        # A terminal sends Ctrl-C to the whole group: then each would be told twice.
        start_new_session=True,
    )
    return _Child(process=process, stderr=stderr)


def _signal(running: Mapping[str, _Child], number: int) -> None:
    for child in running.values():
        with suppress(ProcessLookupError):
            child.process.send_signal(number)


def _last_line(stderr: IO[bytes]) -> str:
    with stderr:
        stderr.seek(0)
        lines = [line for line in stderr.read().decode(errors="replace").splitlines() if line]
    said = [line for line in lines if line.startswith(_PREFIX)] or lines
    return said[-1].removeprefix(_PREFIX).strip() if said else ""
