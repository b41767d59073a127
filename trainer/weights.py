"""The weights of a run: what it trains, commits, restores and writes as its result, by name.

Of a model with an adapter that is the adapter alone, under the names that PEFT gives it in files;
of any other model its whole state dict; of a sharded one the part that this process has of each.

Example::

    names = list(weights_of(model))
    size = sum(tensor.nbytes for tensor in unique(weights_of(model)).values())
"""

from __future__ import annotations

from collections.abc import Mapping
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
