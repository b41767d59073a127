"""Save checkpoints in the background: the caller waits only for a copy of the tensors.

:class:`AsyncSaver` copies the tensors into host memory, and a thread does the rest.

Invariants:

- One save runs at a time. The next call waits for it before it overwrites the copy.
- The thread runs a synchronous save, so ids and durability are the same. A process that dies leaves
  either a complete checkpoint or none.
- Each error is raised once: by the future's ``result()`` or ``exception()`` if the caller asks for
  it, otherwise by the next call, which then does nothing else. If neither happens before the saver
  is deleted or the interpreter ends, the error is printed.
- A save that still runs when the interpreter ends fails with a printed error, so close a saver or
  use ``with``. In a forked process, waiting for a save of the parent raises an error.
- A copy has the bits of its tensor, whatever the layout. Tied tensors are copied once and are tied
  in the copy. A buffer is reused while its tensor keeps shape and dtype. CUDA tensors are copied
  into pinned memory on a separate stream, after the work queued on the current stream.

Example::

    with AsyncSaver(store) as saver:
        for step in range(1000):
            train(model)
            if step % 100 == 0:
                future = saver.save(model, parent=base, step=step)      # returns after a copy
    ckpt = future.result()                                              # durable
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from msft_store._util import format_bytes
from msft_store.errors import InvalidInputError, StorageError
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint, CheckpointFacts
from msft_store.store import Store
from msft_store.tensors.bytes import check_tensors, memory_key
from msft_store.tensors.files import check_files
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
        """Copy tensors into host memory and overwrite the copy that was returned before.

        :class:`StorageError` if there is not enough memory.
        """
        places: dict[tuple[object, ...], str] = {}
        first = {name: places.setdefault(memory_key(t), name) for name, t in tensors.items()}
        once = {name: tensors[name] for name in places.values()}
        self._allocate(once)
        with torch.no_grad():
            self._fill(once)
        return {name: self._buffers[first[name]] for name in tensors}

    def _allocate(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Provide a buffer for each tensor; free the buffers that no longer fit first."""
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
                    f"{format_bytes(sum(t.nbytes for t in tensors.values()))}: {reason}. "
                    "Store.save needs no copy"
                ) from error

    def _fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        # Copies from devices begin first, because they run while the others are made.
        for name, tensor in sorted(tensors.items(), key=lambda item: not item[1].is_cuda):
            with torch.cuda.stream(self._streams.get(tensor.device)):
                self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
        for stream in self._streams.values():
            stream.synchronize()


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    same = (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)
    return same and (buffer.is_pinned() or not tensor.is_cuda)


_T = TypeVar("_T")
State = Mapping[str, torch.Tensor]


class Background:
    """A thread that runs one task at a time on a copy of the caller's tensors."""

    def __init__(self) -> None:
        self._staging = Staging()
        self._tasks: list[_Task[Any]] = []
        """The last task, until :meth:`wait` has checked it for an error."""
        self._thread: threading.Thread | None = None
        weakref.finalize(self, _print_errors, self._tasks)

    def submit(self, tensors: State | torch.nn.Module, work: Callable[[State], _T]) -> Future[_T]:
        """Wait for the running task, copy the tensors, and start ``work`` on the copy."""
        self.wait()
        state = self._staging.copy(check_tensors(tensors))
        task: _Task[_T] = _Task()
        thread = threading.Thread(target=_run, args=(task, work, state), name="msft_store save")
        thread.start()
        self._tasks.append(task)
        self._thread = thread
        return task

    def join(self) -> None:
        """Wait for the running task to end; ignore its outcome."""
        # A callback of the future runs in the thread itself, which cannot wait for itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self) -> None:
        """Wait for the running task to end; raise its error if no caller has received it yet."""
        self.join()
        self._thread = None
        while self._tasks:
            task = self._tasks.pop()
            if not task.error_received:
                task.result()

    def release(self) -> None:
        """Free the memory of the copy; the next copy allocates it again."""
        self._staging = Staging()


class AsyncSaver:
    """Saves checkpoints of one store in the background; for use by one thread.

    Until it is closed, it holds one copy of the tensors in host memory. The copies of CUDA tensors
    are in pinned memory.
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
        references: Iterable[Checkpoint | str] | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        compared: Compared | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Future[Checkpoint]:
        """Copy the tensors and save the copy in the background.

        If the previous save still runs, this waits for it first. The arguments are those of
        :meth:`Store.save`; the tensors may change as soon as this returns.

        Returns:
            A future of the durable checkpoint. It cannot be cancelled.

        Raises:
            InvalidInputError: The saver is closed, or a checkpoint cannot hold one of the values.
            StorageError: There is not enough memory for the copy.
            StoreError: The previous save failed and its future was not asked for the error.
                Nothing was saved.
        """
        if self._closed:
            raise InvalidInputError("this AsyncSaver is closed; make another one for the store")
        facts = CheckpointFacts.of(step=step, metrics=metrics, tags=tags, metadata=metadata)
        save = partial(
            self._store.save,
            parent=parent,
            references=None if references is None else list(references),
            compared=compared,
            files=check_files(files),
            **vars(facts),
        )
        return self._background.submit(tensors, save)

    def wait(self) -> None:
        """Wait until the last save is durable, and raise its error if no caller has received it."""
        self._background.wait()

    def close(self) -> None:
        """Wait for the last save as :meth:`wait` does, free the copy, and refuse later saves."""
        self._closed = True
        try:
            self._background.wait()
        finally:
            self._background.release()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Let the caller's exception through; the future still has the error of the background save.
        if kind is not None:
            self._background.join()
            self._closed = True
            self._background.release()
        else:
            self.close()


class _Task(Future[_T]):
    """The future of one background task; it knows if a caller has received its error."""

    def __init__(self) -> None:
        super().__init__()
        self.error_received = False
        """True if a caller has received the error, or it was printed."""
        self._process = os.getpid()
        self.set_running_or_notify_cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end of the task; return its error, or ``None``."""
        if not self.done() and os.getpid() != self._process:
            raise StorageError(
                f"process {self._process} was forked while it saved; the save continues only in "
                "that process, so wait for it there"
            )
        error = super().exception(timeout)
        self.error_received = self.error_received or error is not None
        return error

    def result(self, timeout: float | None = None) -> _T:
        """Wait for the end of the task; return its result, or raise its error."""
        self.exception(timeout)
        return super().result(timeout)


def _run(task: _Task[_T], work: Callable[[State], _T], state: State) -> None:
    try:
        result = work(state)
    except BaseException as error:
        # Catch KeyboardInterrupt and SystemExit too, or waiting callers would wait forever.
        task.set_exception(error)
        # Thread pools refuse work shortly before the main thread is no longer alive.
        if not threading.main_thread().is_alive() or "interpreter shutdown" in str(error):
            # No caller can ask for it any more, so let threading print it.
            task.error_received = True
            raise StorageError(
                "a save in the background failed as the interpreter ended: close an AsyncSaver or "
                "a Timeline before, or use `with`"
            ) from error
    else:
        task.set_result(result)


def _print_errors(tasks: list[_Task[Any]]) -> None:
    for task in tasks:
        if task.done() and not task.error_received and (error := task.exception()) is not None:
            print("no caller asked for the error of a save in the background:", file=sys.stderr)
            traceback.print_exception(error)
