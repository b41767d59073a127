"""A run whose weights are held in fp32 while its checkpoints are rounded to a 16-bit dtype.

The loop, the strategy, the evaluations and the journal are the trainer's; only the timeline is
another one. It rounds what is committed, and a roll-back restores the rounded weights, so a stage
begins from what its root holds. Metrics are those of the fp32 weights at the commit.

Example::

    summary = train(config, torch.bfloat16)     # with model.dtype float32 and async_save off
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from msft_store import Base, Checkpoint, Policy, Store, Timeline
from trainer.algorithms import make_strategy
from trainer.config.schema import Config
from trainer.journal import read
from trainer.model.weights import drop_tied, weights_of
from trainer.report.summary import Summary, summarize
from trainer.signals import Interrupts
from trainer.training.directory import JOURNAL, create_directory
from trainer.training.loop import Loop
from trainer.training.replay import replay
from trainer.training.rollback_points import begin_stage, keep_only_result, make_policy
from trainer.training.workspace import open_workspace, start_record


class RoundingTimeline(Timeline):
    """A timeline of checkpoints in a dtype that is not that of the weights."""

    def __init__(
        self, store: Store, base: Base, *, retention: Policy, name: str, dtype: torch.dtype
    ) -> None:
        """Begin like any timeline; ``dtype`` is that of the checkpoints."""
        super().__init__(store, base, retention=retention, name=name)
        self._dtype = dtype

    def commit(
        self,
        tensors: Any,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Checkpoint:
        """Commit a rounded copy of a state dict."""
        return super().commit(rounded(tensors, self._dtype), step, metrics, metadata, files)

    def rollback(
        self, checkpoint: Checkpoint | str, *, into: Any = None
    ) -> dict[str, torch.Tensor]:
        """Restore a checkpoint, into tensors of whatever dtype."""
        tensors = super().rollback(checkpoint)
        if into is None:
            return tensors
        for name, tensor in into.items():
            tensor.copy_(tensors[name])
        return {}


def rounded(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a state dict with floating-point tensors in ``dtype``; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        if tensor.data_ptr() not in made:
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            made[tensor.data_ptr()] = tensor.detach().to(wanted)
    return {name: made[tensor.data_ptr()] for name, tensor in state.items()}


def train(config: Config, dtype: torch.dtype) -> Summary:
    """Train from beginning to end with checkpoints in ``dtype``; there is no resume."""
    if config.async_save:
        raise ValueError("a commit in the background is not rounded: set async_save to false")
    create_directory(config)
    with open_workspace(config) as work, Interrupts() as interrupts:
        assert work.store is not None, "this is the main process"
        assert work.base is not None, "this is the main process"
        size = sum(
            t.nbytes for t in rounded(drop_tied(weights_of(work.loaded.model)), dtype).values()
        )
        work.loaded = replace(work.loaded, full_bytes=size)
        strategy = make_strategy(config, work.proportions, mode=work.metrics.mixture.mode)
        policy = make_policy(strategy.needs(), strategy.mode)
        work.timeline = RoundingTimeline(
            work.store, work.base, retention=policy, name=config.method, dtype=dtype
        )
        work.record("run_started", **start_record(work))
        state = replay([], strategy)
        begin_stage(work, state.current, policy)
        stop = Loop(work, strategy, interrupts, state).run()
        keep_only_result(work, stop.checkpoint)
        work.record("finished", checkpoint=stop.checkpoint, model_dir=None)
        work.timeline.close()
    return summarize(read(work.directory / JOURNAL))
