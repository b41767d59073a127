"""The weights of a Trainer's model: whole in every process, or sharded over the processes by FSDP2.

A model that Accelerate shards is whole until its first ``train()``, and sharded in place from then
on, so each operation looks anew. Of a sharded model every process encodes and restores its own
parts, and the main process alone writes the manifest.

Invariant: all processes make the same calls in the same order.

Example::

    weights = RunWeights(trainer, directory / STORE)
    with weights.encode(timeline) as tensors:                   # in every process
        if timeline is not None:
            future = weights.commit(timeline, tensors, step, metrics)
    weights.restore(store, checkpoint)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from msft_store import Box, Checkpoint, Parts, Store, Timeline
from msft_store.integrations.dcp import boxes_of
from msft_store.integrations.hf import KeptModel
from trainer.errors import ConfigError
from trainer.model.sharding import Shards, is_sharded

_CHECKPOINTED = "_checkpoint_wrapped_module."
"""Part of the names of parameters under activation checkpointing, which a state dict omits."""

Tensors = Mapping[str, torch.Tensor] | Parts


def prepare_sharding(trainer: Any) -> None:
    """Prepare a ``train()`` under FSDP2, the first or a later one; change nothing without FSDP.

    Of a model that is sharded already, Accelerate would look for the layers by the names of their
    classes, which FSDP has changed, and put activation checkpointing around them once more. So it
    is told to shard nothing.

    Raises :class:`ConfigError` for what MsftRun does not shard.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if is_sharded(trainer.model):
            raise ConfigError(
                "the model was sharded before its Trainer had it: load it whole, and let the "
                "Trainer shard it (fsdp=True, or accelerate launch --use_fsdp)"
            )
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(
            'MsftRun works with version 2 of FSDP alone: set "version": 2 in fsdp_config, or use '
            "accelerate launch --fsdp_version 2"
        )
    if getattr(trainer.model, "peft_config", None):
        raise ConfigError("MsftRun does not work with an adapter under FSDP: use DDP")
    if trainer.args.torch_compile:
        raise ConfigError(
            "MsftRun does not work with torch_compile under FSDP, which would shard a compiled "
            "copy of the model: leave one of them out"
        )
    if is_sharded(trainer.model):
        plugin.auto_wrap_policy, plugin.activation_checkpointing = None, False


class RunWeights:
    """The weights that a stage trains, as its checkpoints hold them."""

    def __init__(self, trainer: Any, path: Path) -> None:
        """Follow the model of a Trainer; ``path`` is the run's store."""
        self._model: Any = trainer.model
        self._kept = KeptModel(trainer.model)
        self._shards = Shards(trainer.accelerator, trainer.model, path)

    @property
    def full_bytes(self) -> int:
        """The bytes of a full checkpoint."""
        boxes = self._boxes() if is_sharded(self._model) else boxes_of(self._kept.tensors())
        return sum(math.prod(box.shape) * box.tensor.element_size() for box in boxes)

    @contextmanager
    def encode(self, timeline: Timeline | None) -> Iterator[Tensors]:
        """Yield what the main process commits: its tensors, or the parts of all processes."""
        if not is_sharded(self._model):
            yield {} if timeline is None else self._kept.tensors()
            return
        with self._shards.encode_parts(timeline, self._boxes()) as parts:
            yield parts

    def commit(self, timeline: Timeline, tensors: Tensors, *facts: Any) -> Future[Checkpoint]:
        """Commit what :meth:`encode` yields: tensors in the background, parts at once."""
        if not isinstance(tensors, Parts):
            return timeline.commit_async(tensors, *facts)
        future: Future[Checkpoint] = Future()
        future.set_result(timeline.commit(tensors, *facts))
        return future

    def roll_back(self, timeline: Timeline, checkpoint: str) -> None:
        """Restore the main process's weights, and begin a branch of its timeline."""
        sharded = is_sharded(self._model)
        timeline.rollback(checkpoint, into=self._boxes() if sharded else self._kept.tensors())

    def restore(self, store: Store, checkpoint: str) -> None:
        """Restore this process's weights, in place and bit for bit."""
        if is_sharded(self._model):
            store.load_boxes(checkpoint, self._boxes())
        else:
            self._kept.restore(store, checkpoint)

    def _boxes(self) -> list[Box]:
        """Return this process's parts of a sharded model."""
        state = self._model.state_dict()
        trained = (name for name, tensor in self._model.named_parameters() if tensor.requires_grad)
        plain = {name.replace(_CHECKPOINTED, "") for name in trained}
        lacking = ", ".join(sorted(plain - state.keys()))
        if lacking:
            raise ConfigError(
                f"the state dict of the sharded model leaves out what is trained: {lacking}"
            )
        return boxes_of(state)
