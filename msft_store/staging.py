"""A copy of tensors in host memory, so that the originals may change while they are saved.

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

from collections.abc import Mapping

import torch

from msft_store.errors import StorageError
from msft_store.render import human
from msft_store.tensors import memory_of


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
        first = {name: places.setdefault(memory_of(t), name) for name, t in tensors.items()}
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
                    f"no memory for the staging copy of {name!r}, {human(tensor.nbytes)} of "
                    f"{human(sum(t.nbytes for t in tensors.values()))}: {reason}. A save that is "
                    "not in the background needs no copy"
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
