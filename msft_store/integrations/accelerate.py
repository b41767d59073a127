"""Use a store for Accelerate's ``save_state`` and ``load_state``.

:func:`register` puts the weights of ``accelerator.save_state(folder)`` into a store; everything
else is written to the folder as before, because Accelerate's hooks receive only the weights.
Parameters that an optimizer trains and that are of no model are kept with the weights.
:func:`save_state` and :func:`load_state` need no folder: models, optimizers, schedulers, the
gradient scaler, the generators of all processes and the objects registered for checkpointing are in
one checkpoint, without pickle. The position in the data belongs to the caller: save it as
``metadata`` and use ``accelerator.skip_first_batches``.

Sharded models (FSDP2) are refused: use :mod:`msft_store.integrations.dcp` for them.

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
from msft_store.errors import InvalidInputError, MismatchError, NotAStoreError
from msft_store.integrations.model_files import model_files
from msft_store.integrations.trained import (
    outside_parameters,
    outside_state,
    restore_complete,
    restore_outside,
    trained_beside,
)
from msft_store.integrations.training_state import (
    free_prefix,
    from_tensors,
    generators_of_all,
    names_of,
    prefix_of,
    run_in_main_process,
    set_generators,
    to_tensors,
)
from msft_store.maintenance.export_names import KEY as EXPORT
from msft_store.objects.manifest import Checkpoint
from msft_store.storage.backend import LocalBackend, write_atomic
from msft_store.store import Store
from msft_store.tensors.bytes import check_plain, flatten_entries
from msft_store.tensors.files import check_files
from msft_store.tensors.names import plain_names
from msft_store.tensors.nested import json_name
from msft_store.timeline.timeline import Timeline

FILE = "msft_store.json"
"""Name of the file in a folder of ``save_state`` that names the checkpoint with the weights."""
STATE = "accelerator"
"""First part of the names of tensors that are not weights, unless weights have it too."""


def register(
    accelerator: Accelerator,
    timeline: Timeline | None,
    store: Store,
    *,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Make ``accelerator.save_state`` commit the weights, and ``load_state`` restore them.

    A checkpoint that the timeline's retention policy evicted cannot be loaded any more, even if its
    folder still exists.

    Args:
        accelerator: The accelerator whose hooks are registered.
        timeline: The timeline that commits. Only the main process needs it; others may pass
            ``None``.
        store: The store of the timeline, in every process.
        files: Files to keep with the weights, as ``model_files(None, tokenizer)``. The
            configuration of a single transformers model is kept with them.

    Raises:
        InvalidInputError: If the main process has no timeline, or a prepared model cannot be saved.
            The hooks raise it if a model is sharded, and raise errors of the main process in all
            processes.
    """
    if accelerator.is_main_process:
        _require_timeline(timeline)
    # Refuse what cannot be saved now, and not at the first save.
    check_files(files)
    _collect_weights(accelerator, accelerator._models)

    def save(models: list[torch.nn.Module], weights: list[Any], folder: str) -> None:
        weights_by_name = _collect_weights(accelerator, models)
        outside, settings = outside_parameters(accelerator._optimizers, models), {}
        if outside:
            prefix = free_prefix(STATE, weights_by_name)
            weights_by_name |= to_tensors({"outside": outside_state(outside)}, prefix)
            settings = {EXPORT: {"without": f"{prefix}."}}

        def commit() -> None:
            found = _require_timeline(timeline).commit(
                weights_by_name,
                metadata=settings,
                files=_add_model_files(accelerator, models, files),
            )
            text = json.dumps({"checkpoint": found.id, "store": store.path}).encode()
            write_atomic(LocalBackend(check_path(folder)), FILE, text)

        run_in_main_process(commit)
        # Accelerate writes the weights that are left in the list.
        weights.clear()

    def load(models: list[torch.nn.Module], folder: str) -> None:
        path = Path(folder) / FILE
        try:
            identity = str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"])
        except (OSError, ValueError, KeyError):
            raise NotAStoreError(
                f"{path} does not name a checkpoint: was {folder} saved without a store?"
            ) from None
        restore_complete(_as_module(accelerator, models), store, identity)
        _restore_outside(accelerator, models, _load_state(store, store.get(identity)))
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
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Commit the state of everything that the accelerator prepared. All processes must call this.

    Models, optimizers, schedulers, scaler and registered objects are saved. The arguments are as
    for :func:`register` and :meth:`Timeline.commit`; ``metadata`` may hold the position in the
    data.

    Returns:
        The checkpoint's id, in every process.

    Raises:
        InvalidInputError: If a model is sharded, or the main process has no timeline.
        StoreError: If the commit failed in the main process; it is raised in all processes.
    """
    rng_states = generators_of_all()
    weights = _collect_weights(accelerator, accelerator._models)

    def commit() -> str:
        parts = _stateful_objects(accelerator)
        states = {name: part.state_dict() for name, part in parts.items()}
        prefix = free_prefix(STATE, weights)
        # An export of the checkpoint leaves out the tensors that are not weights.
        given = (metadata or {}).get(EXPORT)
        export = {**(given if isinstance(given, Mapping) else {}), "without": f"{prefix}."}
        settings = {**(metadata or {}), EXPORT: export}
        outside = outside_parameters(accelerator._optimizers, accelerator._models)
        state = {"parts": states, "generators": rng_states, "outside": outside_state(outside)}
        tensors = {**weights, **to_tensors(state, prefix)}
        described = _add_model_files(accelerator, accelerator._models, files)
        return _require_timeline(timeline).commit(tensors, step, metrics, settings, described).id

    return run_in_main_process(commit)


def load_state(accelerator: Accelerator, store: Store, checkpoint: Checkpoint | str) -> None:
    """Restore the state that :func:`save_state` committed, in place and bit for bit.

    All processes must call this, with an accelerator that prepared the same objects.

    Raises:
        InvalidInputError: If the checkpoint has the state of other objects than the accelerator.
        MismatchError: If the checkpoint has no such state, or tensors differ in shape or dtype.
        UnknownCheckpointError: If there is no such checkpoint.
        CorruptedError: If a file of the store is damaged.
    """
    found = store.get(checkpoint)
    state = _load_state(store, found)
    if "parts" not in state:
        raise MismatchError(
            f"checkpoint {found.id[:12]} has only weights: load the folder that names it with "
            "accelerator.load_state"
        )
    parts = _stateful_objects(accelerator)
    if parts.keys() != state["parts"].keys():
        raise InvalidInputError(
            f"checkpoint {found.id[:12]} has the state of {', '.join(state['parts'])}; "
            f"this accelerator has prepared {', '.join(parts)}"
        )
    restore_complete(_as_module(accelerator, accelerator._models), store, found)
    _restore_outside(accelerator, accelerator._models, state)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    rng_states = state["generators"]
    if accelerator.process_index < len(rng_states):
        set_generators(rng_states[accelerator.process_index])


def _require_timeline(timeline: Timeline | None) -> Timeline:
    if timeline is None:
        raise InvalidInputError("the main process needs a timeline to commit to")
    return timeline


def _stateful_objects(accelerator: Accelerator) -> dict[str, Any]:
    """Return the objects that have a state besides the models, by name."""
    groups = {
        "optimizer": accelerator._optimizers,
        "scheduler": accelerator._schedulers,
        "object": accelerator._custom_objects,
    }
    parts = {f"{name}{at}": part for name, group in groups.items() for at, part in enumerate(group)}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    return parts


def _load_state(store: Store, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the state in a checkpoint that is not weights; empty if there is none."""
    prefix = prefix_of(checkpoint, STATE)
    tensors = store.load(checkpoint, names_of(store, checkpoint, prefix))
    state: dict[str, Any] = from_tensors(tensors, prefix) if json_name(prefix) in tensors else {}
    return state


def _restore_outside(
    accelerator: Accelerator, models: list[torch.nn.Module], state: Mapping[str, Any]
) -> None:
    outside = outside_parameters(accelerator._optimizers, models)
    restore_outside(outside, state.get("outside", {}))


def _collect_weights(
    accelerator: Accelerator, models: list[torch.nn.Module]
) -> dict[str, torch.Tensor]:
    """Return the weights of all models; those of a single model keep their own names."""
    module = _as_module(accelerator, models)
    state = module.state_dict()
    if any(hasattr(tensor, "placements") for tensor in state.values()):
        raise InvalidInputError(
            "a model is sharded (FSDP2): use msft_store.integrations.dcp, in which every process "
            "saves what it holds"
        )
    return check_plain(flatten_entries(plain_names({**state, **trained_beside(module, state)})))


def _add_model_files(
    accelerator: Accelerator,
    models: list[torch.nn.Module],
    files: Mapping[str, bytes] | None,
) -> dict[str, bytes]:
    """Return files with those of a model, which has its own names in checkpoints if it is alone."""
    return {**model_files(_as_module(accelerator, models)), **(files or {})}


def _as_module(accelerator: Accelerator, models: list[torch.nn.Module]) -> torch.nn.Module:
    found: list[torch.nn.Module] = [accelerator.unwrap_model(model) for model in models]
    if len(found) == 1:
        return found[0]
    return torch.nn.ModuleDict({f"model{at}": model for at, model in enumerate(found)})
