"""The weights of a run: what it trains, commits, restores and writes as its result, by name.

Of a model with an adapter that is the adapter alone, under the names that PEFT gives it in files;
of any other model its whole state dict; of a sharded one the part that this process has of each.

Example::

    names = list(weights_of(model))
    size = sum(tensor.nbytes for tensor in unique(weights_of(model)).values())

How a run's weights go into its checkpoints, and back: exactly, or rounded.

Rounded ones (``snapshot_dtype``) take half of the bytes, and less than that of the differences.
Training itself goes on with the weights as they were, but for everything else the checkpoint is
what counts: evaluations find its metrics, a roll-back restores it, and the result of the run is it.
So no metric in the journal is of weights that the store does not have.

Example::

    snapshots = Snapshots(model, "bfloat16")
    with snapshots.as_committed():
        metrics = evaluate(model)
    checkpoint = timeline.commit(snapshots.take(), metrics=metrics)
    timeline.rollback(checkpoint, into=(room := snapshots.room()))
    snapshots.put_back(room)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

ADAPTER = "default"
"""The name of the adapter inside the model; PEFT's files leave it out."""
_IN_FILES = "base_model.model."


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the run's weights; they share their memory with the model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # What a forward pass has gathered goes; the part of this process is what counts.
            module.reshard()
    state = {name: _own(tensor) for name, tensor in model.state_dict().items()}
    adapter = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return {_in_files(name): tensor for name, tensor in adapter.items()} or state


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unique(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tied tensors once, under the first of their names."""
    seen: set[tuple[Any, ...]] = set()
    once = {}
    for name, tensor in weights.items():
        place = place_of(tensor)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        once[name] = tensor
    return once


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors share that are one: the same memory, seen in the same way."""
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _in_files(name: str) -> str:
    return _IN_FILES + name.replace(f".{ADAPTER}", "")


class Snapshots:
    """The weights of one model as its checkpoints hold them."""

    def __init__(self, model: torch.nn.Module, dtype: str | None) -> None:
        """Prepare; wider floats are rounded to ``dtype``, with ``None`` all is exact."""
        self._model = model
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the weights for a checkpoint: the model's own tensors where they are exact."""
        made: dict[tuple[Any, ...], torch.Tensor] = {}
        weights = weights_of(self._model)
        for tensor in weights.values():
            made.setdefault(place_of(tensor), self._rounded(tensor))
        return {name: made[place_of(tensor)] for name, tensor in weights.items()}

    def room(self) -> dict[str, torch.Tensor]:
        """Return tensors that a checkpoint can be restored into, for :meth:`put_back`.

        They are the model's own where checkpoints are exact, and have no content yet elsewhere.
        """
        return {
            name: torch.empty_like(tensor, dtype=self._dtype) if self._is_wider(tensor) else tensor
            for name, tensor in weights_of(self._model).items()
        }

    def put_back(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the model what a checkpoint holds; other tensors may be among them."""
        with torch.no_grad():
            for name, tensor in weights_of(self._model).items():
                if place_of(tensor) != place_of(tensors[name]):
                    tensor.copy_(tensors[name])

    @contextmanager
    def as_committed(self) -> Iterator[None]:
        """Let the model be what a checkpoint of it would be; afterwards it is as it was.

        Takes memory for one more copy of the weights that are rounded.
        """
        weights = unique(weights_of(self._model)).values()
        exact = [(tensor, tensor.clone()) for tensor in weights if self._is_wider(tensor)]
        with torch.no_grad():
            for tensor, _ in exact:
                tensor.copy_(self._rounded(tensor))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in exact:
                    tensor.copy_(before)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Let the model's tensors have the dtypes of a checkpoint, to be written; see above.

        Only for a model that was restored from one: then nothing is lost on the way there and back.
        """
        wide = [p for p in self._model.parameters() if self._is_wider(p)]
        before = [parameter.dtype for parameter in wide]
        for parameter in wide:
            parameter.data = self._rounded(parameter)
        try:
            yield
        finally:
            for parameter, dtype in zip(wide, before, strict=True):
                parameter.data = parameter.data.to(dtype)

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self._dtype) if self._is_wider(tensor) else tensor

    def _is_wider(self, tensor: torch.Tensor) -> bool:
        dtype = self._dtype
        return (
            dtype is not None
            and tensor.is_floating_point()
            and tensor.element_size() > dtype.itemsize
        )
