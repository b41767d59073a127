"""Accelerate's ``save_state`` and ``load_state`` with a store.

:func:`register` puts the weights of ``accelerator.save_state(folder)`` into a store; all else is
written to the folder as before. That is what Accelerate's hooks can do. :func:`save_state` and
:func:`load_state` need no folder: models, optimizers, schedulers, the gradient scaler, the
generators of all processes and the objects registered for checkpointing are in one checkpoint,
without pickle. Where to go on in the data is the caller's: give it as ``metadata``, and
``accelerator.skip_first_batches`` does the rest.

Models that are sharded (FSDP2) are refused: :mod:`msft_store.integrations.dcp` is for them.

Example::

    register(accelerator, timeline, store)
    accelerator.save_state("run/state")                 # a few files, the weights in the store
    accelerator.load_state("run/state")

    ckpt = save_state(accelerator, timeline, step=40, metrics={"overall": 0.4})
    load_state(accelerator, store, ckpt)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from msft_store._util import check_path
from msft_store.errors import InvalidInputError, NotAStoreError
from msft_store.integrations.training_state import (
    from_tensors,
    generators_of_all,
    in_main_process,
    names_of,
    set_generators,
    to_tensors,
)
from msft_store.maintenance.export_names import KEY as EXPORT
from msft_store.objects.manifest import Checkpoint
from msft_store.storage.backend import LocalBackend, write_atomic
from msft_store.store import Store
from msft_store.tensors.boxes import whole_box
from msft_store.timeline.timeline import Timeline

FILE = "msft_store.json"
"""What a folder of ``save_state`` has in the place of weights: which checkpoint has them."""
STATE = "accelerator"
"""What the names of tensors that are no weights begin with."""


def register(accelerator: Accelerator, timeline: Timeline | None, store: Store) -> None:
    """Let ``accelerator.save_state`` commit the weights, and ``load_state`` restore them.

    ``timeline`` is the main process's, and may be ``None`` in others. What its retention policy
    gives up cannot be loaded any more, whatever folders are left. An error of the main process is
    raised in all.
    """
    if accelerator.is_main_process:
        _given(timeline)

    def save(models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        tensors = _named(accelerator, models)

        def commit() -> None:
            found = _given(timeline).commit(tensors)
            text = json.dumps({"checkpoint": found.id, "store": store.path}).encode()
            write_atomic(LocalBackend(check_path(folder)), FILE, text)

        in_main_process(commit)
        # Accelerate writes what is left in the list.
        weights.clear()

    def load(models: list[torch.nn.Module], folder: str) -> None:
        path = Path(folder) / FILE
        try:
            identity = str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])
        except (OSError, ValueError, KeyError):
            raise NotAStoreError(
                f"{path} does not name a checkpoint: was {folder} saved without a store?"
            ) from None
        _restore(accelerator, store, identity, models)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_state(
    accelerator: Accelerator,
    timeline: Timeline | None,
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Commit everything that the accelerator has prepared; return the checkpoint's id.

    All processes call it; the main one has the timeline. An error of it is raised in all.
    """
    rows = generators_of_all()
    weights = _named(accelerator, accelerator._models)

    def commit() -> str:
        state = {"parts": _states(accelerator), "generators": rows}
        # An export of it is the weights.
        said = {EXPORT: {"without": f"{STATE}."}, **(metadata or {})}
        tensors = {**weights, **to_tensors(state, STATE)}
        return _given(timeline).commit(tensors, step, metrics, said).id

    return in_main_process(commit)


def load_state(accelerator: Accelerator, store: Store, checkpoint: Checkpoint | str) -> None:
    """Restore in every process what :func:`save_state` committed, in place and bit-exact."""
    found = store.get(checkpoint)
    state = from_tensors(store.load(found, names_of(store, found, STATE)), STATE)
    parts = _parts(accelerator)
    if parts.keys() != state["parts"].keys():
        raise InvalidInputError(
            f"checkpoint {found.id[:12]} has the state of {', '.join(state['parts'])}; "
            f"this accelerator has prepared {', '.join(parts)}"
        )
    _restore(accelerator, store, found, accelerator._models)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    rows = state["generators"]
    if accelerator.process_index < len(rows):
        set_generators(rows[accelerator.process_index])


def _given(timeline: Timeline | None) -> Timeline:
    if timeline is None:
        raise InvalidInputError("the main process needs a timeline to commit to")
    return timeline


def _parts(accelerator: Accelerator) -> dict[str, Any]:
    """Return what has a state besides the models, by name."""
    groups = {
        "optimizer": accelerator._optimizers,
        "scheduler": accelerator._schedulers,
        "object": accelerator._custom_objects,
    }
    parts = {f"{name}{at}": part for name, group in groups.items() for at, part in enumerate(group)}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    return parts


def _states(accelerator: Accelerator) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in _parts(accelerator).items()}


def _restore(
    accelerator: Accelerator,
    store: Store,
    checkpoint: Checkpoint | str,
    models: list[torch.nn.Module],
) -> None:
    tensors = _named(accelerator, models)
    store.load_boxes(checkpoint, [whole_box(name, tensor) for name, tensor in tensors.items()])


def _named(accelerator: Accelerator, models: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return the weights of all models; those of one alone have its own names."""
    states = [accelerator.unwrap_model(model).state_dict() for model in models]
    if any(hasattr(tensor, "placements") for state in states for tensor in state.values()):
        raise InvalidInputError(
            "a model is sharded (FSDP2): use msft_store.integrations.dcp, in which every process "
            "saves what it holds"
        )
    if len(states) == 1:
        return dict(states[0])
    return {
        f"model{at}.{name}": tensor
        for at, state in enumerate(states)
        for name, tensor in state.items()
    }
