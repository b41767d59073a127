"""Name a run's weights, and convert them to the form that its checkpoints hold.

The weights are what a run trains, commits, restores and writes as its result: of a model with an
adapter the adapter alone, under the names that PEFT uses in files; of any other model its whole
state dict; of a sharded model this process's part of each tensor.

Checkpoints hold the weights exactly, or rounded (``snapshot_dtype``). Training continues with the
exact weights, but evaluations, roll-backs and the result use the rounded ones.

Invariant: every metric in the journal is of weights that the store holds.

Example::

    snapshots = Snapshots(model, "bfloat16")
    with snapshots.as_committed():
        metrics = evaluate(model)
    checkpoint = timeline.commit(snapshots.take(), metrics=metrics)
    buffers = snapshots.make_buffers()
    timeline.rollback(checkpoint, into=buffers)
    snapshots.restore(buffers)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

ADAPTER = "default"
"""The adapter's name inside the model; PEFT's files omit it."""
_WHOLE = f".modules_to_save.{ADAPTER}."
"""Part of the names of modules that are trained as a whole beside an adapter."""
_IN_FILES = "base_model.model."
"""The prefix of the names in PEFT's files."""


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the run's weights by name; they share their memory with the model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Free what a forward pass has gathered, so that tensors hold this process's part.
            module.reshard()
    state = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    adapter = {
        _IN_FILES + name.replace(_WHOLE, ".").replace(f".{ADAPTER}", ""): tensor
        for name, tensor in state.items()
        if in_adapter(name)
    }
    return adapter or state


def in_adapter(name: str) -> bool:
    """Return whether a name in the state of a model with an adapter is the adapter's."""
    return ".lora_" in name or _WHOLE in name


def drop_tied(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with each tied tensor only once, under its first name."""
    seen: set[tuple[Any, ...]] = set()
    distinct = {}
    for name, tensor in weights.items():
        key = memory_key(tensor)
        if not tensor.numel() or key not in seen:
            seen.add(key)
            distinct[name] = tensor
    return distinct


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tied tensors: views of the same memory in the same layout."""
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


class Snapshots:
    """The weights of one model in the form that its checkpoints hold."""

    def __init__(self, model: torch.nn.Module, dtype: str | None) -> None:
        """Round wider floats to ``dtype``; with ``None``, checkpoints are exact."""
        self._model = model
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the weights for a checkpoint; exact ones are the model's own tensors."""
        rounded: dict[tuple[Any, ...], torch.Tensor] = {}
        weights = weights_of(self._model)
        for tensor in weights.values():
            rounded.setdefault(memory_key(tensor), self._round(tensor))
        return {name: rounded[memory_key(tensor)] for name, tensor in weights.items()}

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Return tensors to load a checkpoint into, for :meth:`restore`.

        Exact ones are the model's own tensors, the others are uninitialised.
        """
        return {
            name: torch.empty_like(tensor, dtype=self._dtype) if self._is_wider(tensor) else tensor
            for name, tensor in weights_of(self._model).items()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy a checkpoint's weights into the model; other tensors are ignored."""
        with torch.no_grad():
            for name, tensor in weights_of(self._model).items():
                if memory_key(tensor) != memory_key(tensors[name]):
                    tensor.copy_(tensors[name])

    @contextmanager
    def as_committed(self) -> Iterator[None]:
        """Round the model's weights as a checkpoint does, and restore the exact ones at the end.

        This takes memory for a copy of all weights that are rounded.
        """
        weights = drop_tied(weights_of(self._model)).values()
        exact = [(tensor, tensor.clone()) for tensor in weights if self._is_wider(tensor)]
        with torch.no_grad():
            for tensor, _ in exact:
                tensor.copy_(self._round(tensor))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in exact:
                    tensor.copy_(before)

    def _round(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self._dtype) if self._is_wider(tensor) else tensor

    def _is_wider(self, tensor: torch.Tensor) -> bool:
        dtype = self._dtype
        return (
            dtype is not None
            and tensor.is_floating_point()
            and tensor.element_size() > dtype.itemsize
        )
