"""What a training step depends on besides the weights: as tensors of a checkpoint, and back.

Optimizers, schedulers, generators and whatever has a ``state_dict`` of plain values. The part that
is no tensor is JSON in a tensor of bytes, so that what stays the same from one checkpoint to the
next costs nothing; nothing is pickled.

Example::

    tensors = to_tensors({"optimizer": optimizer.state_dict(), "rng": generators()}, "training")
    ckpt = store.save({**weights, **tensors})
    state = from_tensors(store.load(ckpt, names_of(store, ckpt, "training")), "training")
    set_generators(state["rng"])
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from msft_store.errors import MismatchError
from msft_store.format import canonical
from msft_store.integrations.agreement import gathered
from msft_store.manifest import Checkpoint
from msft_store.nested import flatten, unflatten
from msft_store.store import Store


def to_tensors(state: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return nested state as tensors whose names begin with ``prefix`` and a point.

    :class:`InvalidInputError` names what is neither a tensor nor plain.
    """
    tensors, tree = flatten(state, prefix)
    tensors[_json(prefix)] = torch.frombuffer(bytearray(canonical(tree)), dtype=torch.uint8)
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
