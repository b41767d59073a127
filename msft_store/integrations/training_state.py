"""Store the state of a training besides its weights as tensors of a checkpoint.

The state comes from optimizers, schedulers, random generators and other objects whose
``state_dict`` holds tensors and plain values. The plain values become JSON in a tensor of bytes, so
that values which are equal in two checkpoints cost nothing. Nothing is pickled.

In a group of ``torch.distributed``, all processes must make the same calls in the same order; a
process without a group works alone.

Example::

    tensors = to_tensors({"optimizer": optimizer.state_dict(), "rng": generators()}, "training")
    ckpt = store.save({**weights, **tensors})
    state = from_tensors(store.load(ckpt, names_of(store, ckpt, "training")), "training")
    set_generators(state["rng"])
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from msft_store.errors import StorageError
from msft_store.maintenance.export_names import export_settings
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store
from msft_store.tensors.nested import from_tensors, to_tensors

__all__ = [
    "free_prefix",
    "from_tensors",
    "gather_objects",
    "generators",
    "generators_of_all",
    "names_of",
    "prefix_of",
    "run_in_main_process",
    "set_generators",
    "to_tensors",
]
_T = TypeVar("_T")


def gather_objects(value: _T) -> list[_T]:
    """Return the values of all processes, by rank."""
    if _size() == 1:
        return [value]
    values: list[Any] = [None] * _size()
    torch.distributed.all_gather_object(values, value)
    return values


def run_in_main_process(action: Callable[[], _T]) -> _T:
    """Run an action in the process of rank 0 only, and return its result in all processes.

    An error is raised in all processes, so that none waits for another that failed: in rank 0
    unchanged, elsewhere as a :class:`StorageError` with its text.
    """
    if _size() == 1:
        return action()
    failure: Exception | None = None
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            outcome[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise StorageError(f"the main process failed with {outcome[1]}")
    result: _T = outcome[0]
    return result


def _size() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def free_prefix(prefix: str, weights: Iterable[str]) -> str:
    """Return a prefix that no weight's name has: ``prefix``, if necessary with underscores."""
    first_parts = {name.partition(".")[0] for name in weights}
    while prefix in first_parts:
        prefix += "_"
    return prefix


def prefix_of(checkpoint: Checkpoint, prefix: str) -> str:
    """Return the prefix that :func:`free_prefix` chose, from the settings of the export."""
    without = export_settings(checkpoint).get("without")
    chosen = isinstance(without, str) and without.rstrip("_.") == prefix
    return str(without).removesuffix(".") if chosen else prefix


def names_of(store: Store, checkpoint: Checkpoint | str, prefix: str) -> list[str]:
    """Return the names of those tensors of a checkpoint that belong to the state ``prefix``."""
    return [name for name in store.tensors(checkpoint) if name.startswith(f"{prefix}.")]


def generators() -> dict[str, Any]:
    """Return the states of this process's random generators: Python, NumPy, torch, CUDA."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_generators(states: Mapping[str, Any]) -> None:
    """Restore this process's random generators; CUDA's only for an equal number of devices."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def generators_of_all() -> list[dict[str, Any]]:
    """Return the generator states of all processes, by rank. All processes must call this."""
    return gather_objects(generators())
