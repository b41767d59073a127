"""Saves in the background: the caller waits for a copy of the tensors, a thread does the rest.

Invariants: one save at a time, and the next call waits for it before it overwrites the copy; the
thread runs what a synchronous save runs, so ids and durability are the same: no checkpoint is
visible before it is durable, and a process that dies leaves none or a whole one. Each error is
raised once: by the future's ``result()`` or ``exception()`` if somebody asks it, otherwise by the
next call; one that nobody has got when the saver goes, or the interpreter ends, is printed. A call
that raises the error of the one before has done nothing itself.

A save that is under way when the interpreter ends fails, and that is printed: close a saver, or use
``with``. In a forked process, waiting for a save that its parent has begun is an error, not a hang.

Example::

    with AsyncSaver(store) as saver:
        for step in range(1000):
            train(model)
            if step % 100 == 0:
                future = saver.save(model, parent=base, step=step)      # returns after a copy
    ckpt = future.result()                                              # durable

A copy of tensors in host memory, so that the originals may change while they are saved.

Invariants: every copy has the bits of its tensor, row by row, whatever the tensor's layout; tied
tensors are copied once and are tied in the copy; a buffer is used again as long as its tensor keeps
shape and dtype. A tensor on a CUDA device goes into pinned memory on a stream of its own, after
what the current stream has still to do, and the caller waits for one event a device.

Example::

    staging = Staging()
    copy = staging.copy(model.state_dict())       # the model may go on
    ...
    copy = staging.copy(model.state_dict())       # the same memory; the copy before is overwritten
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import torch

from msft_store._util import format_bytes
from msft_store.codec.codecs import Level
from msft_store.errors import InvalidInputError, StorageError
from msft_store.objects.bases import Base
from msft_store.objects.catalog import check_level
from msft_store.objects.manifest import Checkpoint, CheckpointFacts
from msft_store.store import Store
from msft_store.tensors.bytes import check_tensors, memory_key
from msft_store.tensors.resident import Compared


class Staging:
    """Host buffers for one state dict at a time.

    Pinned buffers come from PyTorch's caching allocator, which rounds their sizes up to powers of
    two and keeps them for the process.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors in host memory; the copy that was returned before is overwritten.

        :class:`StorageError` if there is no memory for it.
        """
        places: dict[tuple[object, ...], str] = {}
        first = {name: places.setdefault(memory_key(t), name) for name, t in tensors.items()}
        once = {name: tensors[name] for name in places.values()}
        self._allocate(once)
        with torch.no_grad():
            self._fill(once)
        return {name: self._buffers[first[name]] for name in tensors}

    def _allocate(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have a buffer for each tensor; what fits no longer is given up first."""
        self._buffers = {
            name: buffer
            for name, buffer in self._buffers.items()
            if name in tensors and _fits(buffer, tensors[name])
        }
        for name, tensor in tensors.items():
            if name in self._buffers:
                continue
            try:
                self._buffers[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            except (RuntimeError, MemoryError) as error:
                self._buffers = {}
                reason = str(error).partition("\n")[0]
                raise StorageError(
                    f"no memory for the staging copy of {name!r}, {format_bytes(tensor.nbytes)} of "
                    f"{format_bytes(sum(t.nbytes for t in tensors.values()))}: {reason}. A save "
                    "that is not in the background needs no copy"
                ) from error

    def _fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        events = []
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            events.append(self._start(device, here))
        for name, tensor in tensors.items():
            if not tensor.is_cuda:
                self._buffers[name].copy_(tensor)
        for event in events:
            event.synchronize()

    def _start(self, device: torch.device, tensors: Mapping[str, torch.Tensor]) -> torch.cuda.Event:
        """Begin to copy a device's tensors; return the event after the last of them."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
        event: torch.cuda.Event = stream.record_event()
        return event


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    same = (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)
    return same and (buffer.is_pinned() or not tensor.is_cuda)


_T = TypeVar("_T")
State = Mapping[str, torch.Tensor]


class Background:
    """Runs one thing at a time in a thread, on a copy of the tensors that it needs."""

    def __init__(self) -> None:
        self._staging = Staging()
        self._tasks: list[_Task[Any]] = []
        """What was begun last, unless it was waited for."""
        self._thread: threading.Thread | None = None
        weakref.finalize(self, _print_errors, self._tasks)

    def submit(self, tensors: State | torch.nn.Module, work: Callable[[State], _T]) -> Future[_T]:
        """Wait for what is under way, copy the tensors, and run ``work`` on the copy."""
        self.wait()
        state = self._staging.copy(check_tensors(tensors))
        task: _Task[_T] = _Task()
        thread = threading.Thread(target=_run, args=(task, work, state), name="msft_store save")
        thread.start()
        self._tasks.append(task)
        self._thread = thread
        return task

    def join(self) -> None:
        """Wait until nothing is under way, whatever came of it."""
        # A callback of the future is called in the thread itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self) -> None:
        """Wait until nothing is under way, and raise an error that nobody has taken yet."""
        self.join()
        self._thread = None
        while self._tasks:
            task = self._tasks.pop()
            if not task.taken:
                task.result()

    def release(self) -> None:
        """Give the memory of the copy back; the next one takes it again."""
        self._staging = Staging()


class AsyncSaver:
    """Saves checkpoints of one store in the background; for use by one thread.

    It holds one copy of the tensors in host memory until it is closed, pinned where they are on a
    CUDA device.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._background = Background()
        self._closed = False

    def save(
        self,
        tensors: State | torch.nn.Module,
        *,
        parent: Base | Checkpoint | str | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        level: Level | None = None,
        compared: Compared | None = None,
    ) -> Future[Checkpoint]:
        """Save tensors as they are now, as :meth:`Store.save` does; return its checkpoint to come.

        Waits for the save before, if that still runs, and raises its error unless the future was
        asked for it; then nothing is saved. What no checkpoint can hold is
        :class:`InvalidInputError` at once. The future cannot be cancelled.
        """
        if self._closed:
            raise InvalidInputError("this AsyncSaver is closed; make another one of the store")
        facts = CheckpointFacts.of(step=step, metrics=metrics, tags=tags, metadata=metadata)
        if level is not None:
            check_level(level)

        def work(state: State) -> Checkpoint:
            return self._store.save(
                state,
                parent=parent,
                step=facts.step,
                metrics=facts.metrics,
                tags=facts.tags,
                metadata=facts.metadata,
                level=level,
                compared=compared,
            )

        return self._background.submit(tensors, work)

    def wait(self) -> None:
        """Wait until the last save is durable; raise its error unless somebody has taken it."""
        self._background.wait()

    def close(self) -> None:
        """Wait as :meth:`wait` does, and give the memory back; later saves are refused."""
        self._closed = True
        try:
            self._background.wait()
        finally:
            self._background.release()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An error that is on its way says more than one from the background, which the future has.
        if kind is not None:
            self._background.join()
            self._closed = True
            self._background.release()
        else:
            self.close()


class _Task(Future[_T]):
    """What runs in the background."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False
        """Whether somebody has got its error, or it was printed."""
        self._process = os.getpid()
        self.set_running_or_notify_cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the error, or ``None``, once there is an outcome."""
        if not self.done() and os.getpid() != self._process:
            raise StorageError(
                f"process {self._process} was forked while it saved; only there the save goes on, "
                "and only there it can be waited for"
            )
        error = super().exception(timeout)
        self.taken = self.taken or error is not None
        return error

    def result(self, timeout: float | None = None) -> _T:
        """Return the result, or raise the error, once there is an outcome."""
        self.exception(timeout)
        return super().result(timeout)


def _run(task: _Task[_T], work: Callable[[State], _T], state: State) -> None:
    try:
        result = work(state)
    except BaseException as error:
        # KeyboardInterrupt and SystemExit too: whoever waits would wait forever.
        task.set_exception(error)
        # Pools refuse work a moment before the main thread counts as ended.
        if not threading.main_thread().is_alive() or "interpreter shutdown" in str(error):
            # Nobody will ask any more: threading prints it.
            task.taken = True
            raise StorageError(
                "a save in the background failed as the interpreter ended: close an AsyncSaver or "
                "a Timeline before, or use `with`"
            ) from error
    else:
        task.set_result(result)


def _print_errors(tasks: list[_Task[Any]]) -> None:
    for task in tasks:
        if task.done() and not task.taken and (error := task.exception()) is not None:
            print("nobody has asked for the error of a save in the background:", file=sys.stderr)
            traceback.print_exception(error)
