"""The weights of a run: what it trains, commits, restores and writes as its result, by name.

Of a model with an adapter that is the adapter alone, under the names that PEFT gives it in files;
of any other model its whole state dict.

Example::

    names = list(weights_of(model))
    size = sum(tensor.nbytes for tensor in unique(weights_of(model)).values())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

ADAPTER = "default"
"""The name of the adapter inside the model; PEFT's files leave it out."""
_IN_FILES = "base_model.model."


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the run's weights; they share their memory with the model."""
    state = model.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return {_in_files(name): tensor for name, tensor in adapter.items()} or dict(state)


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
