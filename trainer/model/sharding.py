"""Shard a model over processes with FSDP2, as ``accelerate launch --use_fsdp`` requests it.

Every process commits and restores its own part of the model and never sees the rest. The parts are
boxes of tensors; see :mod:`msft_store.integrations.dcp`.

Invariants: all processes make the same calls in the same order; only the main process decides what
is kept and writes manifests; a device never holds more than its part of weights and gradients and
one more layer or tensor; on the host, only the main process of a machine holds the whole model, and
only while it is loaded.

Example::

    shards = shard_model(accelerator, model, directory / STORE)
    with shards.encode_parts(timeline, shards.make_boxes(tensors)) as parts:    # in every process
        if timeline is not None:
            timeline.commit(parts, step, metrics)
    shards.load(checkpoint, tensors)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from msft_store import Box, NotAStoreError, Part, Parts, Store, StoreError, Timeline
from msft_store.integrations.dcp import boxes_of
from msft_store.integrations.training_state import gather_objects
from trainer.config.schema import Config
from trainer.distributed import share
from trainer.errors import ConfigError, RunError, TrainerError
from trainer.model.weights import weights_of

_REQUESTED = "ACCELERATE_USE_FSDP"
_LOAD_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Lets transformers read the weights in one process of a machine, and give the others none."""


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether FSDP shards a model."""
    return isinstance(model, FSDPModule)


def shard_model(
    accelerator: Accelerator, model: Any, path: Path, *, compute_dtype: str | None = None
) -> Shards | None:
    """Shard a model in place; return ``None`` if each process keeps the whole model.

    The weights come from the main process; the other processes need not have loaded any. Each layer
    is an FSDP unit, and the rest of the model is one more. ``path`` is the run's store. Layers are
    gathered in ``compute_dtype`` if it is given.
    """
    if not parse_flag_from_env(_REQUESTED) or accelerator.num_processes == 1:
        return None
    weights = model.state_dict()
    _allocate_weights(model)
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
    shards.copy_from_main(weights)
    return shards


def _policy(layer: torch.nn.Module, compute_dtype: str | None) -> MixedPrecisionPolicy:
    """Return the dtypes in which a layer is gathered and its gradients are reduced.

    If weights were gathered in their own dtype, autocast would keep a converted copy of all layers
    on every device until the backward pass.
    """
    if compute_dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, compute_dtype),
        reduce_dtype=next(layer.parameters()).dtype,
        cast_forward_inputs=False,
    )


def _allocate_weights(model: torch.nn.Module) -> None:
    """Allocate memory, without touching it, for weights that this process has not loaded."""
    allocated: dict[torch.Tensor, torch.Tensor] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in [*parameters, *model.named_buffers()]:
        if tensor.is_meta:
            fresh = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, allocated.setdefault(tensor, fresh))


def prepare_sharding(config: Config, accelerator: Accelerator) -> None:
    """If FSDP is requested, let only the main process of each machine load the weights.

    Raises :class:`ConfigError` for a setting that FSDP does not support.
    """
    if not parse_flag_from_env(_REQUESTED):
        return
    os.environ[_LOAD_ONCE] = "true"
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError(
            "only version 2 of FSDP is supported: use accelerate launch --fsdp_version 2"
        )
    settings = {
        "resident_reference": config.resident_reference,
        "max_disk": config.max_disk is not None,
        "msft.optimizer_on_rollback=restore": config.restores_optimizer,
        "lora": config.lora is not None,
        f"train.optimizer={config.train.optimizer}": config.train.optimizer.endswith("bit"),
        "train.stochastic_rounding": config.train.stochastic_rounding,
        "method=dynamix": config.method == "dynamix",
    }
    unsupported = [name for name, is_set in settings.items() if is_set]
    if unsupported:
        raise ConfigError(
            f"FSDP does not support {', '.join(unsupported)}: leave it out, or train without FSDP"
        )


class Shards:
    """Commits and restores a sharded model, in all processes together."""

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, path: Path) -> None:
        """Prepare; ``path`` is the run's store, which the main process creates."""
        self._accelerator = accelerator
        self._model = model
        self._path = path
        self._opened: Store | None = None

    @contextmanager
    def encode_parts(self, timeline: Timeline | None, boxes: Sequence[Box]) -> Iterator[Parts]:
        """Encode this process's ``boxes``; yield the parts of all processes for the commit.

        An error in one process is raised in all of them, because the others wait for its part. No
        gc deletes the parts while the main process is in this context.
        """
        root = share(None if timeline is None or timeline.root is None else timeline.root.id)
        with nullcontext() if timeline is None else self._open_store().awaiting_parts():
            yield self._gather_parts(root, boxes)

    def load(self, checkpoint: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load this process's parts of a checkpoint into ``tensors``."""
        self._open_store().load_boxes(checkpoint, self.make_boxes(tensors))

    def copy_from_main(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the main process's weights into the parts of all processes, tensor by tensor."""
        device = self._accelerator.device
        with torch.no_grad():
            for box in self.make_boxes(weights_of(self._model)):
                if self._accelerator.is_main_process:
                    tensor = weights[box.name].to(device).contiguous()
                else:
                    tensor = torch.empty(box.shape, dtype=box.tensor.dtype, device=device)
                broadcast(tensor)
                sides = zip(box.offset, box.tensor.shape, strict=True)
                box.tensor.copy_(tensor[tuple(slice(at, at + size) for at, size in sides)])

    def make_boxes(self, tensors: Mapping[str, torch.Tensor]) -> list[Box]:
        """Return this process's tensors with their places in the whole tensors."""
        return [
            replace(box, tensor=tensors[box.name]) for box in boxes_of(self._model.state_dict())
        ]

    def _gather_parts(self, root: str | None, boxes: Sequence[Box]) -> Parts:
        mine: Part | Exception
        try:
            mine = self._open_store().encode(boxes, parent=root)
        except (StoreError, TrainerError, OSError) as error:
            mine = error
        parts: list[Any] = gather_objects(mine)
        errors = [part for part in parts if isinstance(part, Exception)]
        if errors:
            raise mine if isinstance(mine, Exception) else errors[0]
        return Parts(parts)

    def _open_store(self) -> Store:
        if self._opened is None:
            try:
                self._opened = Store.open(self._path)
            except NotAStoreError as error:
                raise RunError(
                    f"process {self._accelerator.process_index} finds no store at {self._path}: "
                    "output_dir must be a directory that all machines share"
                ) from error
        return self._opened
