"""The optimizer steps of a stage, and the totals that the journal records of them.

The loss of a step is the mean over all target tokens of its batch, so neither the number of
micro-batches nor the number of processes changes what is learned. Processes take turns at the
micro-batches; one that has none left in the last turn adds a loss of zero.

Example::

    steps = StageSteps(work, stage, schedule)
    steps.train(step=0)
    steps.take_totals()                     # {"loss": …, "lr": …, "tokens": …}
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch

from trainer.batches import Step, epoch_plan
from trainer.errors import RunError
from trainer.forward import collate, target_losses
from trainer.optim import learning_rate, set_learning_rate
from trainer.schedule import Schedule
from trainer.strategy import Stage
from trainer.workspace import Workspace


class StageSteps:
    """Trains the active sub-datasets of one stage, one optimizer step at a time."""

    def __init__(self, work: Workspace, stage: Stage, schedule: Schedule) -> None:
        """Prepare; the optimizer keeps the state that it has."""
        train = work.split("train")
        self._work = work
        self._stage = stage
        self._schedule = schedule
        self._examples = [example for name in stage.active for example in train[name]]
        self._lengths = [len(example) for example in self._examples]
        self._epoch = -1
        self._batches: tuple[Step, ...] = ()
        self._forget_totals()

    def train(self, step: int) -> None:
        """Do optimizer step ``step`` (from 0) of the stage."""
        config, model, optimizer = self._work.config.train, self._work.model, self._work.optimizer
        batch = self._batch(step)
        targets = sum(len(self._examples[i].completion) for micro in batch for i in micro)
        model.train()
        self._losses += self._backward(batch, targets)
        self._grad_norm = None
        if config.max_grad_norm is not None:
            accelerator = self._work.accelerator
            self._grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        self._lr = learning_rate(config, step=step, steps=self._schedule.steps)
        set_learning_rate(optimizer, self._lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._count(batch, targets)

    def take_totals(self) -> dict[str, Any] | None:
        """Return the fields of a ``trained`` record since the last call; ``None`` for no step.

        A loss that is not finite is in ``loss`` as it is; see :func:`check_loss`.
        """
        if not self._targets:
            return None
        losses = self._losses
        if self._work.accelerator.num_processes > 1:
            losses = self._work.accelerator.reduce(losses, reduction="sum")
        totals = {
            "loss": float(losses) / self._targets,
            "lr": self._lr,
            "grad_norm": None if self._grad_norm is None else float(self._grad_norm),
            "tokens": self._tokens,
            "attention_tokens": self._attention_tokens,
            "target_tokens": self._targets,
            "padded_tokens": self._padded,
            "seconds": time.monotonic() - self._began,
        }
        self._forget_totals()
        return totals

    def restart_clock(self) -> None:
        """Leave the time since the last totals out: it went into something else."""
        self._began = time.monotonic()

    def _backward(self, batch: Step, targets: int) -> torch.Tensor:
        """Add the batch's gradients; return this process's share of the summed loss, float32."""
        accelerator, model = self._work.accelerator, self._work.model
        processes, rank = accelerator.num_processes, accelerator.process_index
        total = torch.zeros((), device=accelerator.device)
        turns = -(-len(batch) // processes)
        for turn in range(turns):
            mine = turn * processes + rank
            weight = 1.0 if mine < len(batch) else 0.0
            rows = [self._examples[i] for i in batch[mine if weight else 0]]
            pad = self._work.loaded.pad_token_id
            tensors = collate(rows, pad_token_id=pad, device=accelerator.device)
            with nullcontext() if turn == turns - 1 else accelerator.no_sync(model):
                loss = target_losses(model, tensors)[0].sum() * weight
                # DDP averages gradients over processes, but the loss is a mean over all targets.
                accelerator.backward(loss * (processes / targets))
            total += loss.detach()
        return total

    def _batch(self, step: int) -> Step:
        epoch, place = divmod(step, self._schedule.steps_per_epoch)
        if epoch != self._epoch:
            train = self._work.config.train
            self._epoch = epoch
            self._batches = epoch_plan(
                seed=self._work.config.seed,
                stage=self._stage.number,
                epoch=epoch,
                lengths=self._lengths,
                batch_size=train.batch_size,
                micro_batch_size=train.micro_batch_size,
            )
        return self._batches[place]

    def _count(self, batch: Step, targets: int) -> None:
        self._targets += targets
        for micro in batch:
            lengths = [self._lengths[i] for i in micro]
            self._tokens += sum(lengths)
            self._attention_tokens += sum(length * length for length in lengths)
            self._padded += max(lengths) * len(lengths) - sum(lengths)

    def _forget_totals(self) -> None:
        self._losses = torch.zeros((), device=self._work.accelerator.device)
        self._lr, self._grad_norm = 0.0, None
        self._tokens = self._attention_tokens = self._targets = self._padded = 0
        self._began = time.monotonic()


def check_loss(loss: float, *, stage: int, epoch: float) -> None:
    """Raise :class:`RunError` for a loss that is not finite: the weights are beyond repair."""
    if not math.isfinite(loss):
        raise RunError(
            f"the training loss is {loss} at stage {stage}, epoch {epoch:.2f}: training has "
            "diverged; begin again with a smaller train.lr, or with train.max_grad_norm set"
        )
