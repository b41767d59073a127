"""Convert the states of optimizer and random generators to tensors, and back without loss.

torch's generators are tensors with a row for each process; Python's and NumPy's are JSON. With
``msft.optimizer_on_rollback=restore`` a rollback point holds all of this beside the weights, as
tensors whose names begin with ``trainer.``. Schedule and data position are not stored: they follow
from the step of the checkpoint. The result of a run is stored without its training state.

Example::

    rng = gather_rng(accelerator)                               # in all processes
    tensors = add_training_state(weights, optimizer, rng)
    restore_training_state(tensors, optimizer, accelerator)     # in all processes
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

PREFIX = "trainer."
"""Prefix of all tensors that are not weights; no weight's name may begin with it."""
_OPTIMIZER, _RNG, _PYTHON = f"{PREFIX}optimizer.", f"{PREFIX}rng.", f"{PREFIX}python_rng"


def optimizer_tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return an optimizer's state, named ``{parameter number}.{key}``; empty if it is fresh."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, state in states.items() for key, value in state.items()}


def load_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the state that :func:`optimizer_tensors` returned into an optimizer."""
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
    """Set this process's generators to the states that :func:`gather_rng` returned.

    Raises :class:`RunError` if another number of processes saved them.
    """
    for states in rows.values():
        if len(states) != accelerator.num_processes:
            raise RunError(
                f"this state was saved by {len(states)} processes, but this run has "
                f"{accelerator.num_processes}: resume with {len(states)}. Or remove "
                "resume.safetensors and resume/ from the run's directory, to continue from the "
                "root of the stage"
            )
    # torch reads a state from the start of its memory, so a row must not be a view of all rows.
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


def add_training_state(
    weights: Mapping[str, torch.Tensor], optimizer: Any, rows: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return weights, optimizer state and generators; ``rows`` are from :func:`gather_rng`."""
    text = bytearray(json.dumps(python_rng()).encode())
    return {
        **weights,
        **{f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()},
        **{f"{_RNG}{name}": tensor for name, tensor in rows.items()},
        _PYTHON: torch.frombuffer(text, dtype=torch.uint8),
    }


def is_weight(name: str) -> bool:
    """Return whether a tensor of a rollback point is a weight of the model."""
    return not name.startswith(PREFIX)


def save_weights_only(store: Store, checkpoint: str, *, name: str) -> str:
    """Save a checkpoint's weights as a checkpoint under the ref ``name``, once; return its id."""
    refs = store.refs()
    if name in refs:
        return refs[name]
    source = store.get(checkpoint)
    weights = store.load(source, names=[n for n in store.tensors(source) if is_weight(n)])
    metadata = {key: value for key, value in source.metadata.items() if key != "timeline"}
    saved = store.save(
        weights,
        parent=source.base,
        step=source.step,
        metrics=source.metrics,
        metadata={**metadata, "weights_of": source.id},
        files=store.files(source),
    )
    store.pin(saved, name)
    return saved.id


def restore_training_state(
    tensors: Mapping[str, torch.Tensor], optimizer: Any, accelerator: Accelerator
) -> None:
    """Restore optimizer and generators in every process; the main process has ``tensors``."""
    state = {name: tensor for name, tensor in tensors.items() if not is_weight(name)}
    state = _broadcast_tensors(state, accelerator)
    load_optimizer(optimizer, strip_prefix(_OPTIMIZER, state))
    set_rng(strip_prefix(_RNG, state), accelerator)
    set_python_rng(json.loads(bytes(state[_PYTHON].tolist())))


def strip_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _broadcast_tensors(
    tensors: dict[str, torch.Tensor], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Return the main process's tensors in every process."""
    if accelerator.num_processes == 1:
        return tensors
    shapes = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    broadcast_object_list(shapes)
    shared = {}
    for name, shape, dtype in shapes[0]:
        empty = torch.empty(shape, dtype=dtype, device=accelerator.device)
        shared[name] = tensors[name].to(accelerator.device) if name in tensors else empty
        broadcast(shared[name])
    return {name: tensor.cpu() for name, tensor in shared.items()}
