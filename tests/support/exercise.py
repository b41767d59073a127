"""All operations of a store; each may raise a :class:`StoreError` and nothing else.

Run as a program, it does so with each store that it is given, in little memory: where more than
``ROOM`` is taken, that is an error, too.

Example::

    python -m tests.support.exercise a/store b/store
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msft_store import KeepLast, Store, StoreError, Timeline
from msft_store.cli.main import main as command

ROOM = 1 << 30
"""Bytes of address space besides what an idle process has."""


def use(path: Path, work: Path) -> None:
    """Call every read of a store; the export goes to a folder that is removed first."""
    shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(StoreError):
        store = Store.open(path)
        doings: list[Callable[[], Any]] = [store.check, store.stats, store.notes, store.plan_gc]
        for ckpt in store.log():
            doings += [
                lambda ckpt=ckpt: store.load(ckpt),
                lambda ckpt=ckpt: store.sources(ckpt),
                lambda ckpt=ckpt: store.export(ckpt, work / ckpt.id),
            ]
        for doing in doings:
            with contextlib.suppress(StoreError):
                doing()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for words in (["inspect"], ["inspect", "--json"]):
            command(["--store", str(path), *words])


def change(path: Path) -> None:
    """Save into a store, continue its timeline and run gc."""
    state = {"w": torch.arange(9)}
    with contextlib.suppress(StoreError):
        store = Store.open(path)
        for parent in [*store.bases(), *store.log()]:
            with contextlib.suppress(StoreError):
                assert torch.equal(store.load(store.save(state, parent=parent))["w"], state["w"])
        with (
            contextlib.suppress(StoreError),
            Timeline(store, None, name="run", retention=KeepLast(1)) as line,
        ):
            line.commit(state)
        store.plan_gc().execute()


def main(paths: list[str]) -> None:
    """Use each store."""
    with open("/proc/self/statm", encoding="ascii") as file:
        idle = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (idle + ROOM, idle + ROOM))
    # The machine does not fail here, only the process would.
    os.fsync = lambda descriptor: None
    for path in paths:
        print(path, flush=True)
        use(Path(path), Path(path).with_name("out"))
        change(Path(path))


if __name__ == "__main__":
    main(sys.argv[1:])
