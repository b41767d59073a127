"""Rollback points that hold more than weights: ``msft.optimizer_on_rollback: restore``.

Beside the weights, such a checkpoint has the optimizer's state and the random number generators, as
tensors whose names begin with ``trainer.``. Schedule and data position need no bytes: they follow
from the step that the checkpoint was made after. The result of a run is stored without all this.

Example::

    tensors = whole(weights, optimizer, rows)
    put_back(tensors, optimizer, accelerator)        # in all processes

Optimizer and random number generators as tensors, and back, to the last bit.

torch's generators are rows, one for each process; Python's and NumPy's are JSON.

Example::

    tensors = optimizer_tensors(optimizer)          # {"0.exp_avg": …, "0.step": …}
    load_optimizer(optimizer, tensors)
    rows = gather_rng(accelerator)                  # in all processes
    set_rng(rows, accelerator)
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list

from msft_store import Store
from trainer.errors import RunError


def optimizer_tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return an optimizer's state by number of the parameter and name; empty for a fresh one."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, state in states.items() for key, value in state.items()}


def load_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an optimizer the state that :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def gather_rng(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators, (processes, bytes), in every process."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    rows = {name: state[None] for name, state in states.items()}
    if accelerator.num_processes == 1:
        return rows
    device = accelerator.device
    return {name: accelerator.gather(row.to(device)).cpu() for name, row in rows.items()}


def set_rng(rows: Mapping[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Give this process's generators the states that :func:`gather_rng` returned.

    :class:`RunError` if they are of another number of processes.
    """
    for states in rows.values():
        if len(states) != accelerator.num_processes:
            raise RunError(
                f"this state was saved by {len(states)} processes, and these are "
                f"{accelerator.num_processes}: resume with as many. Or remove resume.safetensors "
                "and resume/ from the run's directory, to go on from the root of the stage"
            )
    # torch reads a state from where memory begins, so a row must not be a view of others.
    mine = {name: states[accelerator.process_index].cpu().clone() for name, states in rows.items()}
    torch.set_rng_state(mine["cpu"])
    if accelerator.device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], accelerator.device)


def python_rng() -> dict[str, Any]:
    """Return the states of Python's and NumPy's generators as JSON values."""
    kind, words, position, has_gauss, gauss = np.random.get_state()
    return {
        "random": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), position, has_gauss, gauss],
    }


def set_python_rng(states: Mapping[str, Any]) -> None:
    """Restore what :func:`python_rng` returned."""
    version, words, gauss = states["random"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])


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
