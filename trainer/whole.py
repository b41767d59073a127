"""Rollback points that hold more than weights: ``msft.optimizer_on_rollback: restore``.

Beside the weights, such a checkpoint has the optimizer's state and the random number generators, as
tensors whose names begin with ``trainer.``. Schedule and data position need no bytes: they follow
from the step that the checkpoint was made after. The result of a run is stored without all this.

Example::

    tensors = whole(weights, optimizer, rows)
    put_back(tensors, optimizer, accelerator)        # in all processes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list

from msft_store import Store
from trainer.state import (
    load_optimizer,
    optimizer_tensors,
    python_rng,
    set_python_rng,
    set_rng,
)

PREFIX = "trainer."
"""No weight's name may begin with it."""
_OPTIMIZER, _RNG, _PYTHON = f"{PREFIX}optimizer.", f"{PREFIX}rng.", f"{PREFIX}python_rng"


def whole(
    weights: Mapping[str, torch.Tensor], optimizer: Any, rows: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return weights, optimizer and generators; ``rows`` are from ``gather_rng``."""
    text = bytearray(json.dumps(python_rng()).encode())
    return {
        **weights,
        **{f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()},
        **{f"{_RNG}{name}": tensor for name, tensor in rows.items()},
        _PYTHON: torch.frombuffer(text, dtype=torch.uint8),
    }


def is_weight(name: str) -> bool:
    """Return whether a tensor of a rollback point is the model's own."""
    return not name.startswith(PREFIX)


def weights_alone(store: Store, checkpoint: str, *, name: str) -> str:
    """Store a checkpoint's weights as one of their own under a ref, once; return its id."""
    refs = store.refs()
    if name in refs:
        return refs[name]
    found = store.get(checkpoint)
    weights = store.load(found, names=[n for n in store.tensors(found) if is_weight(n)])
    facts = {key: value for key, value in found.metadata.items() if key != "timeline"}
    alone = store.save(
        weights,
        parent=found.base,
        step=found.step,
        metrics=found.metrics,
        metadata={**facts, "weights_of": found.id},
    )
    store.pin(alone, name)
    return alone.id


def put_back(tensors: Mapping[str, torch.Tensor], optimizer: Any, own: Accelerator) -> None:
    """Restore in every process what :func:`whole` added; the main process has ``tensors``."""
    rest = {name: tensor for name, tensor in tensors.items() if not is_weight(name)}
    rest = _shared(rest, own)
    load_optimizer(optimizer, _under(_OPTIMIZER, rest))
    set_rng(_under(_RNG, rest), own)
    set_python_rng(json.loads(bytes(rest[_PYTHON].tolist())))


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _shared(tensors: dict[str, torch.Tensor], own: Accelerator) -> dict[str, torch.Tensor]:
    """Return the main process's tensors in every process."""
    if own.num_processes == 1:
        return tensors
    shapes = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    broadcast_object_list(shapes)
    shared = {}
    for name, shape, dtype in shapes[0]:
        empty = torch.empty(shape, dtype=dtype, device=own.device)
        shared[name] = tensors[name].to(own.device) if name in tensors else empty
        broadcast(shared[name])
    return {name: tensor.cpu() for name, tensor in shared.items()}
