"""The processes of a distributed run: share decisions, and end all processes if one fails.

If a process fails, the others may wait for it forever in a collective operation. So a thread in
each process polls for a failure, prints its message and ends the process at once. A resume treats
that like a kill. A run of one process starts no thread.

Example::

    with watch_failures():
        train()
    decision = share(decision)                      # the main process's value in all
    if any_of(signalled, accelerator): ...
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.errors import RunError, first_line
from trainer.signals import Interrupted

_T = TypeVar("_T")


def this_process() -> PartialState:
    """Return accelerate's state of this process, and force CPU mode if there is no accelerator.

    ``accelerate launch --use_fsdp`` has no option for CPUs, and without CPU mode every process
    would assume that it is the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_peer_failure(error: BaseException) -> bool:
    """Return True if an error means that another process of the run has ended."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def split_among_processes(
    items: Sequence[_T], accelerator: Accelerator, *, equal_counts: bool
) -> Iterator[tuple[_T, bool]]:
    """Yield this process's share of the items, each with True if it is its own.

    With ``equal_counts`` a process that has one item less gets another process's item in addition,
    because a sharded model needs all processes in each forward pass.
    """
    count, rank = accelerator.num_processes, accelerator.process_index
    for item in items[rank::count]:
        yield item, True
    rest = len(items) % count
    if equal_counts and 0 < rest <= rank:
        yield items[0], False


def share(value: Any) -> Any:
    """Return the main process's value in every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def share_decision(decision: Any) -> Any:
    """Return the main process's decision in every process; raise an error if it made none."""
    shared = share(decision)
    if shared is None:
        raise RunError("the main process made no decision")
    return shared


def any_of(flag: bool, accelerator: Accelerator) -> bool:
    """Return True in all processes if the flag is set in any of them."""
    if accelerator.num_processes == 1:
        return flag
    number = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(number, reduction="sum") > 0)


_FAILED, _ENDING = "failed", "ending"
"""Keys in the store: the message of a failure, and the number of processes that know it."""
_POLL_SECONDS = 0.2
_TIMEOUT_SECONDS = 10.0
"""Time that a failed process waits for the others to read its message."""


@contextmanager
def watch_failures() -> Iterator[None]:
    """End all processes of a run if an error leaves this context in one of them.

    All processes must enter the context. A signal needs no report, because every process gets it.
    """
    state = this_process()
    if state.num_processes == 1:
        yield
        return
    store = _connect(state)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, over), name="failures", daemon=True)
    watcher.start()
    failure: BaseException | None = None
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        failure = error
        raise
    finally:
        over.set()
        watcher.join()
        if failure is None:
            state.wait_for_everyone()
        else:
            # If the main process has ended, the store is gone and no process needs the report.
            with suppress(RuntimeError):
                _report_failure(store, failure, count=state.num_processes)


def _connect(state: PartialState) -> TCPStore:
    """Return a store that all processes share; the main process serves it."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    store = None
    if state.is_main_process:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = share(None if store is None else store.port)
    return store or TCPStore(host, port, is_master=False)


def _report_failure(store: TCPStore, error: BaseException, *, count: int) -> None:
    store.set(_FAILED, first_line(error))
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    store.add(_ENDING, 1)
    while store.add(_ENDING, 0) < count and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 4)


def _watch(store: TCPStore, over: threading.Event) -> None:
    """Poll for a failure of another process; print its message and end this process."""
    while not over.wait(_POLL_SECONDS):
        try:
            if not store.check([_FAILED]):
                continue
            end = f"has failed: {store.get(_FAILED).decode()}"
        except RuntimeError:
            # The main process keeps the store, and does not answer any more.
            end = "has ended; see its last lines, then continue with `msft-train resume RUN`"
        if not over.is_set():
            print(f"msft-train: another process of this run {end}", file=sys.stderr, flush=True)
            with suppress(RuntimeError):
                store.add(_ENDING, 1)
            os._exit(1)
