"""Convert the states of optimizer and random generators to tensors, and back without loss.

With ``msft.optimizer_on_rollback=restore`` a rollback point holds all of this beside the weights,
as tensors whose names begin with ``trainer.``. Schedule and data position are not stored: they
follow from the step of the checkpoint. The result of a run is stored without its training state.

Example::

    tensors = {**weights, **gather_training_state(optimizer)}   # in all processes
    restore_training_state(tensors, optimizer, accelerator)     # in all processes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.distributed.tensor import DTensor

from msft_store import Store
from msft_store.integrations.training_state import (
    from_tensors,
    generators_of_all,
    set_generators,
    to_tensors,
)
from trainer.distributed import share
from trainer.errors import RunError

PREFIX = "trainer."
"""Prefix of all tensors that are not weights; no weight's name may begin with it."""
_PACKED = "packed"
_OPTIMIZER, _RNG = f"{PREFIX}optimizer.", f"{PREFIX}rng"


def optimizer_tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return an optimizer's state, named ``{parameter number}.{key}``; empty if it is fresh.

    Moments in few bits are several tensors each, under names that begin with ``packed``.
    """
    states = optimizer.state_dict()["state"]
    named = {f"{i}.{key}": value for i, state in states.items() for key, value in state.items()}
    packed = {n: value for n, value in named.items() if type(value) not in (torch.Tensor, DTensor)}
    plain = {name: value for name, value in named.items() if name not in packed}
    return {**plain, **(to_tensors(packed, _PACKED) if packed else {})}


def load_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the state that :func:`optimizer_tensors` returned into an optimizer."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    plain = {n: tensor for n, tensor in tensors.items() if not n.startswith(_PACKED)}
    packed = from_tensors(tensors, _PACKED) if len(plain) < len(tensors) else {}
    for name, tensor in {**plain, **packed}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def gather_rng(prefix: str) -> dict[str, torch.Tensor]:
    """Return the states of the random generators of all processes, in every process."""
    return to_tensors(generators_of_all(), prefix)


def set_rng(states: Sequence[Mapping[str, Any]], accelerator: Accelerator) -> None:
    """Set this process's generators to its own of the states of all processes.

    Raises :class:`RunError` if another number of processes saved them.
    """
    if len(states) != accelerator.num_processes:
        raise RunError(
            f"this state was saved by {len(states)} processes, but this run has "
            f"{accelerator.num_processes}: resume with {len(states)}. Or remove "
            "resume.safetensors and resume/ from the run's directory, to continue from the "
            "root of the stage"
        )
    set_generators(states[accelerator.process_index])


def gather_training_state(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return the states of optimizer and generators; all processes must call this."""
    state = {f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    return {**state, **gather_rng(_RNG)}


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
    state = _broadcast_tensors(strip_prefix(_OPTIMIZER, tensors), accelerator)
    load_optimizer(optimizer, state)
    set_rng(share(from_tensors(tensors, _RNG) if tensors else None), accelerator)


def strip_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _broadcast_tensors(
    tensors: dict[str, torch.Tensor], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Return the main process's tensors in every process."""
    if accelerator.num_processes == 1:
        return tensors
    shapes = share([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
    shared = {}
    for name, shape, dtype in shapes:
        empty = torch.empty(shape, dtype=dtype, device=accelerator.device)
        shared[name] = tensors[name].to(accelerator.device) if name in tensors else empty
        broadcast(shared[name])
    return {name: tensor.cpu() for name, tensor in shared.items()}
