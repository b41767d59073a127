"""Where one process of a run fails, all of them end, with its message.

The others may be waiting for its share of a computation, for ever. So in each process a thread
looks for an alarm; on one it says why and ends the process at once, as a kill would, which a run
survives. With one process there is nothing of all this.

Example::

    with FailureWatch():
        train()

What the processes of a run tell each other: one decides, all act.

Example::

    together = RunProcesses(accelerator)
    decision = together.share(decision)             # the main process's, in every process
    if together.any_of(signalled): ...
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.errors import RunError
from trainer.signals import Interrupted

_T = TypeVar("_T")


def this_process() -> PartialState:
    """Return accelerate's view of the processes; on CPUs it must be told that there are several.

    ``accelerate launch --use_fsdp`` has no option for it, and without it every process would take
    itself for the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_alone(error: BaseException) -> bool:
    """Return whether an error says that another process of the run has gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def in_turns(
    items: Sequence[_T], accelerator: Accelerator, *, alike: bool
) -> Iterator[tuple[_T, bool]]:
    """Yield this process's share of items, and whether each is its own.

    ``alike``: every process gets as many, the last one maybe another's, for a model that they have
    only together.
    """
    count, rank = accelerator.num_processes, accelerator.process_index
    for item in items[rank::count]:
        yield item, True
    rest = len(items) % count
    if alike and 0 < rest <= rank:
        yield items[0], False


class RunProcesses:
    """The processes of a run."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Prepare; all processes then make the same calls in the same order."""
        self._accelerator = accelerator
        self.is_one = accelerator.num_processes == 1

    def share(self, value: Any) -> Any:
        """Return the main process's value in every process."""
        shared = [value]
        if not self.is_one:
            broadcast_object_list(shared)
        if shared[0] is None:
            raise RunError("the main process has decided nothing")
        return shared[0]

    def any_of(self, flag: bool) -> bool:
        """Return whether any process has the flag, the same in all of them."""
        if self.is_one:
            return flag
        number = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(number, reduction="sum") > 0)


_FAILED, _ENDING = "failed", "ending"
_EVERY = 0.2
"""Seconds between two looks."""
_PATIENCE = 10.0
"""Seconds that a process which fails waits until the others know."""


class FailureWatch:
    """Ends all processes of a run where an error leaves this context in one of them."""

    def __init__(self) -> None:
        """Prepare; nothing happens before the context is entered."""
        self._store: TCPStore | None = None
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="alarm", daemon=True)

    def __enter__(self) -> FailureWatch:
        """Connect the processes; all of them must come here."""
        state = this_process()
        if state.num_processes == 1:
            return self
        host = os.environ.get("MASTER_ADDR", "localhost")
        port = [0]
        if state.is_main_process:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [self._store.port]
        broadcast_object_list(port)
        if self._store is None:
            self._store = TCPStore(host, port[0], is_master=False)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ring where there is an error; a signal reaches all processes without."""
        if self._store is None:
            return
        self._over.set()
        self._watcher.join()
        if error is None or isinstance(error, Interrupted):
            this_process().wait_for_everyone()
        else:
            # Where the main process has gone already, there is nobody to tell.
            with suppress(RuntimeError):
                self._ring(self._store, error)

    def _ring(self, store: TCPStore, error: BaseException) -> None:
        lines = str(error).strip().splitlines()
        store.set(_FAILED, lines[0] if lines else type(error).__name__)
        count, deadline = this_process().num_processes, time.monotonic() + _PATIENCE
        store.add(_ENDING, 1)
        while store.add(_ENDING, 0) < count and time.monotonic() < deadline:
            time.sleep(_EVERY / 4)

    def _watch(self) -> None:
        store = self._store
        while store is not None and not self._over.wait(_EVERY):
            try:
                why = store.get(_FAILED).decode() if store.check([_FAILED]) else None
            except RuntimeError:
                why = "the main process has gone"
            if why is not None and not self._over.is_set():
                print(
                    f"msft-train: another process of this run has failed: {why}",
                    file=sys.stderr,
                    flush=True,
                )
                with suppress(RuntimeError):
                    store.add(_ENDING, 1)
                os._exit(1)
