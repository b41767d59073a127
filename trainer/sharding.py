"""A model that no process holds whole: FSDP2, as ``accelerate launch --use_fsdp`` asks for it.

Every process works on the part that it has: it commits it, restores it and never sees the rest.
What a roll-back needs is the same as elsewhere; :mod:`msft_store.integrations.dcp` has the boxes.

Invariants: all processes make the same calls in the same order; the main process alone decides what
is kept, and publishes checkpoints; no process ever holds more than its own part and a few chunks.

Example::

    shards = Shards(accelerator, directory / STORE)
    with shards.parts(timeline, tensors) as parts:      # in every process
        if timeline is not None:
            timeline.commit(parts, step, metrics)
    shards.load(checkpoint, tensors)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from msft_store import Box, Parts, Store, Timeline
from msft_store.integrations.dcp import boxes_of
from trainer.errors import ConfigError
from trainer.settings import Config
from trainer.weights import weights_of

_ASKED = "ACCELERATE_USE_FSDP"


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether processes have a part of a model each."""
    return isinstance(model, FSDPModule)


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Return model and optimizer as the processes work on them, as Accelerate was asked to.

    On CPUs it leaves FSDP2 to us: then each layer is a unit of its own, and the rest another one.
    """
    asked = parse_flag_from_env(_ASKED) and accelerator.num_processes > 1
    if not asked or accelerator.device.type != "cpu":
        return tuple(accelerator.prepare(model, optimizer))
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    after = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [after[before[id(parameter)]] for parameter in group["params"]]
    return model, accelerator.prepare(optimizer)


def check_sharded(config: Config, accelerator: Accelerator) -> None:
    """Raise :class:`ConfigError` for what a sharded model does not go with, before it is loaded."""
    if not parse_flag_from_env(_ASKED):
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError("FSDP is supported in its version 2: accelerate launch --fsdp_version 2")
    wanted = {
        "resume_every": config.resume_every is not None,
        "resident_reference": config.resident_reference,
        "max_disk": config.max_disk is not None,
        "msft.optimizer_on_rollback=restore": config.restores_optimizer,
        "lora": config.lora is not None,
        "method=dynamix": config.method == "dynamix",
    }
    refused = [name for name, is_set in wanted.items() if is_set]
    if refused:
        raise ConfigError(
            f"with FSDP, {', '.join(refused)} cannot be had: leave it out, or train without FSDP. "
            "A run that is killed goes on from the root of its stage"
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
    def parts(
        self, timeline: Timeline | None, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[Parts]:
        """Encode what every process has; give all parts, for the main process's commit.

        ``tensors`` are this process's own, as :func:`trainer.weights.weights_of` names them. In
        the context of the main process no gc takes them away.
        """
        root = self._shared(None if timeline is None or timeline.root is None else timeline.root.id)
        store = self._store()
        if timeline is None:
            yield self._gathered(store, root, tensors)
            return
        with store.awaiting_parts():
            yield self._gathered(store, root, tensors)

    def load(self, checkpoint: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill this process's own tensors from a checkpoint."""
        self._store().load_boxes(checkpoint, self.boxes(tensors))

    def copy(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Give this process its own part of whole tensors."""
        own = weights_of(self._model)
        with torch.no_grad():
            for box in self.boxes(own):
                sides = zip(box.offset, box.tensor.shape, strict=True)
                place = tuple(slice(first, first + size) for first, size in sides)
                box.tensor.copy_(whole[box.name][place])

    def boxes(self, tensors: Mapping[str, torch.Tensor]) -> list[Box]:
        """Return this process's tensors with their places in the whole."""
        return [
            replace(box, tensor=tensors[box.name]) for box in boxes_of(self._model.state_dict())
        ]

    def _gathered(
        self, store: Store, root: str | None, tensors: Mapping[str, torch.Tensor]
    ) -> Parts:
        mine = store.encode(self.boxes(tensors), parent=root)
        parts: list[Any] = [None] * self._accelerator.num_processes
        torch.distributed.all_gather_object(parts, mine)
        return Parts(parts)

    def _shared(self, value: str | None) -> str | None:
        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def _store(self) -> Store:
        if self._opened is None:
            self._opened = Store.open(self._path)
        return self._opened
