"""The optimizer steps of a stage, and the totals that the journal records of them.

The loss of a step is the mean over all target tokens of its batch, so neither the number of
micro-batches nor the number of processes changes what is learned. Processes take turns at the
micro-batches; one that has none left in the last turn adds a loss of zero.

Example::

    steps = StageSteps(work, stage, schedule, order=order)
    steps.train(step=0)
    steps.take_totals()                     # {"loss": …, "lr": …, "tokens": …}
"""

from __future__ import annotations

import itertools
import time
from contextlib import nullcontext
from typing import Any

import torch

from trainer.batches import DataOrder, Step, micro_batches
from trainer.divergence import Finding, not_finite
from trainer.forward import collate, target_losses
from trainer.optim import learning_rate, set_learning_rate
from trainer.schedule import Schedule
from trainer.strategy import Stage
from trainer.workspace import Workspace


class StageSteps:
    """Trains the active sub-datasets of one stage, one optimizer step at a time."""

    def __init__(
        self,
        work: Workspace,
        stage: Stage,
        schedule: Schedule,
        *,
        order: DataOrder,
        steps_before: int = 0,
    ) -> None:
        """Prepare; the optimizer keeps the state that it has.

        ``steps_before`` are those that the learning rate's schedule has behind it, in earlier
        stages; it is stretched to end with this one.
        """
        train = work.split("train")
        self._work = work
        self._stage = stage
        self._schedule = schedule
        self._order = order
        self._steps_before = steps_before
        self._examples = [example for name in stage.active for example in train[name]]
        self._lengths = [len(example) for example in self._examples]
        starts = itertools.accumulate((len(train[name]) for name in stage.active), initial=0)
        self._starts = dict(zip(stage.active, starts, strict=False))
        self._forget_totals()

    def train(self, step: int) -> Finding | None:
        """Do optimizer step ``step`` (from 0) of the stage, the same in all processes.

        Where the loss or the norm of the gradients is not finite, the weights stay as they were,
        and what was found is returned.
        """
        config, model, optimizer = self._work.config.train, self._work.model, self._work.optimizer
        batch = self._batch(step)
        targets = sum(len(self._examples[i].completion) for micro in batch for i in micro)
        model.train()
        loss = self._backward(batch, targets)
        self._losses += loss
        self._grad_norm = None
        if config.max_grad_norm is not None:
            accelerator = self._work.accelerator
            self._grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        before = self._steps_before
        self._lr = learning_rate(config, step=before + step, steps=before + self._schedule.steps)
        set_learning_rate(optimizer, self._lr)
        self._count(batch, targets)
        finding = not_finite({"training loss": loss, "gradient norm": self._grad_norm})
        if finding is None:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return finding

    def take_totals(self) -> dict[str, Any] | None:
        """Return the fields of a ``trained`` record since the last call; ``None`` for no step."""
        if not self._targets:
            return None
        totals = {
            "loss": float(self._losses) / self._targets,
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
        """Add the batch's gradients; return its summed loss over all processes, float32."""
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
        if processes > 1:
            total = accelerator.reduce(total, reduction="sum")
        return total

    def _batch(self, step: int) -> Step:
        positions = [self._starts[name] + i for name, i in self._order.step(step)]
        return micro_batches(positions, self._lengths, self._work.config.train.micro_batch_size)

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
