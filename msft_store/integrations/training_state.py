"""What a training step depends on besides the weights: as tensors of a checkpoint, and back.

Optimizers, schedulers, generators and whatever has a ``state_dict`` of plain values. The part that
is no tensor is JSON in a tensor of bytes, so that what stays the same from one checkpoint to the
next costs nothing; nothing is pickled.

Example::

    tensors = to_tensors({"optimizer": optimizer.state_dict(), "rng": generators()}, "training")
    ckpt = store.save({**weights, **tensors})
    state = from_tensors(store.load(ckpt, names_of(store, ckpt, "training")), "training")
    set_generators(state["rng"])

What the processes of a training agree on, so that none waits for another that has failed.

In a group of ``torch.distributed`` all processes make the same calls in the same order; where there
is no group, a process is on its own.

Example::

    rows = gathered(generators())                   # of all processes, by rank
    ckpt = in_main_process(lambda: timeline.commit(tensors).id)
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from msft_store.errors import MismatchError, StorageError
from msft_store.format.layout import canonical_json
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store
from msft_store.tensors.nested import flatten, unflatten

_T = TypeVar("_T")


def gathered(value: _T) -> list[_T]:
    """Return the value of every process, by rank."""
    if _size() == 1:
        return [value]
    values: list[Any] = [None] * _size()
    torch.distributed.all_gather_object(values, value)
    return values


def in_main_process(action: Callable[[], _T]) -> _T:
    """Do something in the first process alone; return what it returns, in all of them.

    An error is raised in all: in the first one as it is, elsewhere as a :class:`StorageError` with
    its text.
    """
    if _size() == 1:
        return action()
    failed: Exception | None = None
    said: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            said[0] = action()
        except Exception as error:
            failed = error
            said[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(said)
    if failed is not None:
        raise failed
    if said[1] is not None:
        raise StorageError(f"the main process has failed with {said[1]}")
    result: _T = said[0]
    return result


def _size() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def to_tensors(state: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return nested state as tensors whose names begin with ``prefix`` and a point.

    :class:`InvalidInputError` names what is neither a tensor nor plain.
    """
    tensors, tree = flatten(state, prefix)
    tensors[_json(prefix)] = torch.frombuffer(bytearray(canonical_json(tree)), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> Any:
    """Return what :func:`to_tensors` took apart; :class:`MismatchError` if there is nothing."""
    text = tensors.get(_json(prefix))
    if text is None:
        raise MismatchError(f"the checkpoint holds weights alone, no state named {prefix!r}")
    return unflatten(tensors, json.loads(text.cpu().numpy().tobytes()))


def names_of(store: Store, checkpoint: Checkpoint | str, prefix: str) -> list[str]:
    """Return the names of a checkpoint's tensors that are state, not weights."""
    return [name for name in store.tensors(checkpoint) if name.startswith(f"{prefix}.")]


def generators() -> dict[str, Any]:
    """Return the state of this process's random generators: Python, NumPy, torch, CUDA."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_generators(states: Mapping[str, Any]) -> None:
    """Give this process's random generators the state they had."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def generators_of_all() -> list[dict[str, Any]]:
    """Return the state of every process's generators, by rank; all processes must call this."""
    return gathered(generators())


def _json(prefix: str) -> str:
    return f"{prefix}.json"
