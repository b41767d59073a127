"""A model that no process holds whole: FSDP2, as ``accelerate launch --use_fsdp`` asks for it.

Every process works on the part that it has: it commits it, restores it and never sees the rest.
What a roll-back needs is the same as elsewhere; :mod:`msft_store.integrations.dcp` has the
boxes.

Invariants: all processes make the same calls in the same order; the main process alone decides what
is kept, and publishes checkpoints; no device ever holds more than its own part, of weights and of
gradients, and one layer or tensor besides; on the host, only the main process of a machine holds
the whole, while it is loaded.

Example::

    shards = split(accelerator, model, directory / STORE)
    with shards.parts(timeline, shards.boxes(tensors)) as parts:        # in every process
        if timeline is not None:
            timeline.commit(parts, step, metrics)
    shards.load(checkpoint, tensors)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from msft_store import Box, NotAStoreError, Part, Parts, Store, StoreError, Timeline
from msft_store.integrations.dcp import boxes_of
from trainer.config.schema import Config
from trainer.errors import ConfigError, RunError, TrainerError
from trainer.model.weights import weights_of

_ASKED = "ACCELERATE_USE_FSDP"
_LOAD_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Lets transformers read the weights in one process of a machine, and give the others none."""


def is_asked() -> bool:
    """Return whether the processes were started for a model that is sharded."""
    asked: bool = parse_flag_from_env(_ASKED)
    return asked


def load_once() -> None:
    """Let no process but the main one of a machine load weights, where they are to be sharded."""
    if is_asked():
        os.environ[_LOAD_ONCE] = "true"


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether processes have a part of a model each."""
    return isinstance(model, FSDPModule)


def split(
    accelerator: Accelerator, model: Any, path: Path, *, compute_dtype: str | None = None
) -> Shards | None:
    """Leave every process its part of a model, in place; ``None`` where each is to have it whole.

    The weights are those of the main process, and the others need not have loaded any. Each layer
    is a unit of its own, the rest another one. ``path`` is the run's store. With a
    ``compute_dtype`` layers are gathered in it.
    """
    if not is_asked() or accelerator.num_processes == 1:
        return None
    whole = model.state_dict()
    _make_room(model)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    }
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        options["reshard_after_forward"] = plugin.reshard_after_forward
        if plugin.cpu_offload:
            options["offload_policy"] = plugin.cpu_offload
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, **options, mp_policy=_policy(module, compute_dtype))
    fully_shard(model, **options)
    shards = Shards(accelerator, model, path)
    shards.copy(whole)
    return shards


def _policy(layer: torch.nn.Module, compute_dtype: str | None) -> MixedPrecisionPolicy:
    """Return in which dtypes a layer is gathered and its gradients are reduced.

    What autocast makes of weights that come in their own dtype stays for the backward pass: a copy
    of all layers, on every device.
    """
    if compute_dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, compute_dtype),
        reduce_dtype=next(layer.parameters()).dtype,
        cast_forward_inputs=False,
    )


def _make_room(model: torch.nn.Module) -> None:
    """Give memory to weights that were not loaded; it is not touched before they come."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            room = torch.empty_like(parameter, device="cpu")
            fresh = torch.nn.Parameter(room, requires_grad=parameter.requires_grad)
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, made.setdefault(parameter, fresh))
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, torch.empty_like(buffer, device="cpu"))


def check_sharded(config: Config, accelerator: Accelerator) -> None:
    """Raise :class:`ConfigError` for what a sharded model does not go with, before it is loaded."""
    if not is_asked():
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError("FSDP is supported in its version 2: accelerate launch --fsdp_version 2")
    wanted = {
        "resident_reference": config.resident_reference,
        "max_disk": config.max_disk is not None,
        "msft.optimizer_on_rollback=restore": config.restores_optimizer,
        "lora": config.lora is not None,
        "method=dynamix": config.method == "dynamix",
    }
    refused = [name for name, is_set in wanted.items() if is_set]
    if refused:
        raise ConfigError(
            f"with FSDP, {', '.join(refused)} cannot be had: leave it out, or train without FSDP"
        )


class Shards:
    """Commits and restores a sharded model, in all processes together."""

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, path: Path) -> None:
        """``path`` is the run's store, which the main process makes."""
        self._accelerator = accelerator
        self._model = model
        self._path = path
        self._opened: Store | None = None

    @contextmanager
    def parts(self, timeline: Timeline | None, boxes: Sequence[Box]) -> Iterator[Parts]:
        """Encode what every process has; give all parts, for the main process's commit.

        What fails in one process is raised in all, for the others wait for its part.
        ``boxes`` are this process's own. In the context of the main process no gc takes them away.
        """
        root = self.shared(None if timeline is None or timeline.root is None else timeline.root.id)
        if timeline is None:
            yield self._gathered(root, boxes)
            return
        with self._store().awaiting_parts():
            yield self._gathered(root, boxes)

    def load(self, checkpoint: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill this process's own tensors from a checkpoint."""
        self._store().load_boxes(checkpoint, self.boxes(tensors))

    def copy(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Give every process its own part of the main process's tensors, one after the other."""
        device = self._accelerator.device
        with torch.no_grad():
            for box in self.boxes(weights_of(self._model)):
                if self._accelerator.is_main_process:
                    tensor = whole[box.name].to(device).contiguous()
                else:
                    tensor = torch.empty(box.shape, dtype=box.tensor.dtype, device=device)
                broadcast(tensor)
                sides = zip(box.offset, box.tensor.shape, strict=True)
                box.tensor.copy_(tensor[tuple(slice(at, at + size) for at, size in sides)])

    def boxes(self, tensors: Mapping[str, torch.Tensor]) -> list[Box]:
        """Return this process's tensors with their places in the whole."""
        return [
            replace(box, tensor=tensors[box.name]) for box in boxes_of(self._model.state_dict())
        ]

    def _gathered(self, root: str | None, boxes: Sequence[Box]) -> Parts:
        mine: Part | Exception
        try:
            mine = self._store().encode(boxes, parent=root)
        except (StoreError, TrainerError, OSError) as error:
            mine = error
        parts: list[Any] = [None] * self._accelerator.num_processes
        torch.distributed.all_gather_object(parts, mine)
        errors = [part for part in parts if isinstance(part, Exception)]
        if errors:
            raise mine if isinstance(mine, Exception) else errors[0]
        return Parts(parts)

    def shared(self, value: str | None) -> str | None:
        """Return the main process's value in every process."""
        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def _store(self) -> Store:
        if self._opened is None:
            try:
                self._opened = Store.open(self._path)
            except NotAStoreError as error:
                raise RunError(
                    f"process {self._accelerator.process_index} finds no store at {self._path}: "
                    "output_dir must be a directory that all machines share"
                ) from error
        return self._opened
