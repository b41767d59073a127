"""Train the optimizer steps of a stage, and count the totals that the journal records of them.

The loss of a step is the mean over all target tokens of its batch, or as ``train.loss_average``
says; what is recorded is the mean over tokens. The number of processes does not change the result,
and the number of micro-batches only if they are averaged. Processes take turns at the
micro-batches; a process without one in the last turn adds a loss of zero. Mastered examples get a
forward pass only, for their loss. A step with mastered examples only leaves the weights unchanged.

Example::

    steps = StageSteps(work, stage, schedule, order=order)
    steps.train(step=0)
    steps.take_totals()                     # {"loss": …, "lr": …, "tokens": …}
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainer.algorithms.base import Adjustment, ExampleLosses, Stage
from trainer.algorithms.divergence import NonFiniteNumber, first_non_finite
from trainer.data.batches import DataOrder, MicroBatch, Reference, SampledOrder, Step, micro_batches
from trainer.data.examples import Example
from trainer.data.schedule import Schedule
from trainer.distributed import split_among_processes
from trainer.errors import RunError
from trainer.model.forward import (
    TokenCost,
    collate,
    loss_count,
    mean_losses,
    summed_loss,
    target_losses,
)
from trainer.model.optim import learning_rate, set_learning_rate
from trainer.model.sharding import is_sharded
from trainer.training.stage import continue_order
from trainer.training.workspace import Workspace


def compute_token_losses(work: Workspace, model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Return the losses of the examples' target tokens (targets,), float32."""
    pad, device = work.loaded.pad_token_id, work.accelerator.device
    return target_losses(model, collate(examples, pad_token_id=pad, device=device))[0]


class StageSteps:
    """Trains the active sub-datasets of one stage, one optimizer step at a time."""

    def __init__(
        self,
        work: Workspace,
        stage: Stage,
        schedule: Schedule,
        *,
        order: DataOrder | SampledOrder,
        steps_before: int = 0,
    ) -> None:
        """Prepare the stage; the optimizer keeps its current state.

        ``steps_before`` are the steps of earlier stages that count in the schedule of the learning
        rate, which ends with this stage.
        """
        train = work.split("train")
        # Sub-datasets that the stage does not train on may come back within it.
        names = sorted(train)
        self.stage = stage
        self.schedule = schedule
        self._work = work
        self._order = order
        self._first_step = 0
        self._steps_before = steps_before
        self._examples = [example for name in names for example in train[name]]
        self._lengths = [len(example) for example in self._examples]
        starts = itertools.accumulate((len(train[name]) for name in names), initial=0)
        self._starts = dict(zip(names, starts, strict=False))
        self._mastered: frozenset[int] = frozenset()
        self._collects_losses = isinstance(stage.observe, ExampleLosses)
        self._collected: list[tuple[Reference, float]] = []
        self._last_loss: float | None = None
        self._reset_totals()

    def train(self, step: int) -> NonFiniteNumber | None:
        """Do optimizer step ``step`` (from 0) of the stage, the same in all processes.

        If the loss or the norm of the gradients is not finite, the weights stay as they were, and
        the finding is returned.
        """
        began = time.monotonic()
        config, model, optimizer = self._work.config.train, self._work.model, self._work.optimizer
        references = self._order.step(step - self._first_step)
        batch, mastered = self._split_batch(references)
        targets = sum(self._examples[i].targets for micro in batch for i in micro)
        model.train()
        losses = torch.zeros(len(self._examples) if self._collects_losses else 0)
        loss = self._backward(batch, losses)
        self._forward(mastered, losses)
        self._collect_losses(references, losses)
        self._losses += loss
        self._grad_norm = None
        if config.max_grad_norm is not None and batch:
            accelerator = self._work.accelerator
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._lr = self.lr(step)
        set_learning_rate(optimizer, self._lr)
        self._targets += targets
        self._cost += self._cost_of(batch)
        self._forward_cost += self._cost_of(mastered)
        finding = first_non_finite({"training loss": loss, "gradient norm": self._grad_norm})
        if finding is None and batch:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._seconds += time.monotonic() - began
        return finding

    def lr(self, step: int) -> float:
        """Return the learning rate of a step of the stage."""
        before, config = self._steps_before, self._work.config
        lr = learning_rate(config.train, step=before + step, steps=before + self.schedule.steps)
        restart = round(config.msft.restart_warmup * self.schedule.steps_per_epoch)
        if self.stage.number == 1 or before or step >= restart:
            return lr
        return lr * (step + 1) / restart

    def epoch_at(self, index: int) -> float:
        """Return the epoch of an evaluation of the stage; index 0 is the evaluation of the root."""
        return self.schedule.epoch(self.schedule.evaluations[index - 1]) if index else 0.0

    def change(self, step: int, stage: Stage) -> None:
        """Train on the active set and the shares of ``stage`` from a step on."""
        config, sizes = self._work.config, self._work.train_sizes
        order, first = self._order, step - self._first_step
        if not isinstance(order, DataOrder):
            raise RunError("a stage that draws its examples by weights keeps its active set")
        self._order = continue_order(order, config, stage, sizes, step=first)
        self._first_step = step
        self.stage = stage

    def adjust(self, step: int, adjustment: Adjustment) -> None:
        """Apply an adjustment from a step on."""
        if adjustment.weights and isinstance(self._order, SampledOrder):
            self._order.reweigh(step, adjustment.weights)
        self._mastered = frozenset(
            self._starts[name] + i for name, places in adjustment.mastered.items() for i in places
        )

    def take_losses(self) -> tuple[dict[str, list[int]], dict[str, list[float]]] | None:
        """Return places and losses of the examples since the last call, or ``None``."""
        if not self._collected:
            return None
        places: dict[str, list[int]] = {}
        values: dict[str, list[float]] = {}
        for (name, i), loss in self._collected:
            places.setdefault(name, []).append(i)
            values.setdefault(name, []).append(loss)
        self._collected = []
        return places, values

    def mean_loss(self) -> float | None:
        """Return the mean loss of the steps since the last totals, or of the last totals."""
        return float(self._losses) / self._targets if self._targets else self._last_loss

    def take_totals(self) -> dict[str, Any] | None:
        """Return the fields of a ``trained`` record since the last call; ``None`` for no step."""
        if not self._cost.tokens + self._forward_cost.tokens:
            return None
        loss = float(self._losses) / self._targets if self._targets else None
        self._last_loss = self._last_loss if loss is None else loss
        totals = {
            "loss": loss,
            "lr": self._lr,
            "grad_norm": None if self._grad_norm is None else float(self._grad_norm),
            "target_tokens": self._targets,
            **vars(self._cost),
            **{f"forward_{name}": count for name, count in vars(self._forward_cost).items()},
            "seconds": self._seconds,
        }
        self._reset_totals()
        return totals

    def _backward(self, batch: Step, losses: torch.Tensor) -> torch.Tensor:
        """Add the batch's gradients; return the sum of its token losses over all processes."""
        accelerator, model = self._work.accelerator, self._work.model
        processes, rank = accelerator.num_processes, accelerator.process_index
        total = torch.zeros((), device=accelerator.device)
        average = self._work.config.train.loss_average
        rows = [[self._examples[i] for i in micro] for micro in batch]
        count = loss_count(rows, average)
        turns = -(-len(batch) // processes)
        for turn in range(turns):
            mine = turn * processes + rank
            weight = 1.0 if mine < len(batch) else 0.0
            micro = batch[mine if weight else 0]
            # Without a reduction in each turn, FSDP2 would keep the gradients of the whole model
            # in every process.
            reduces = turn == turns - 1 or is_sharded(model)
            with nullcontext() if reduces else accelerator.no_sync(model):
                token_losses = self._token_losses(model, micro)
                loss = summed_loss(token_losses, rows[mine if weight else 0], average) * weight
                # DDP averages gradients over processes, but the loss is a mean over the batch.
                accelerator.backward(loss * (processes / count))
            if weight:
                self._store_means(micro, token_losses, losses)
            total += token_losses.detach().sum() * weight
        if processes > 1:
            total = accelerator.reduce(total, reduction="sum")
        return total

    def _forward(self, batch: Step, losses: torch.Tensor) -> None:
        """Compute the losses of this process's share of mastered examples, without gradients."""
        accelerator = self._work.accelerator
        # DDP needs as many forward passes in every process, so the model is used without it.
        model = accelerator.unwrap_model(self._work.model)
        with torch.no_grad():
            for micro, mine in split_among_processes(
                batch, accelerator, equal_counts=is_sharded(model)
            ):
                token_losses = self._token_losses(model, micro)
                if mine:
                    self._store_means(micro, token_losses, losses)

    def _token_losses(self, model: Any, micro: MicroBatch) -> torch.Tensor:
        return compute_token_losses(self._work, model, [self._examples[i] for i in micro])

    def _store_means(
        self, micro: MicroBatch, token_losses: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """Store each example's mean loss if the strategy observes losses."""
        if self._collects_losses:
            examples = [self._examples[i] for i in micro]
            losses[list(micro)] = mean_losses(token_losses, examples)

    def _collect_losses(self, references: Sequence[Reference], losses: torch.Tensor) -> None:
        """Gather the losses of a step from all processes if the strategy observes losses."""
        if not self._collects_losses:
            return
        mine = losses[[self._starts[name] + i for name, i in references]]
        accelerator = self._work.accelerator
        if accelerator.num_processes > 1:
            # Each example belongs to one process and is 0 in the others, so the sum is exact.
            mine = accelerator.reduce(mine.to(accelerator.device), reduction="sum").cpu()
        self._collected += zip(references, mine.tolist(), strict=True)

    def _split_batch(self, references: Sequence[Reference]) -> tuple[Step, Step]:
        """Return the micro-batches that are trained on, and those of mastered examples."""
        places = [self._starts[name] + i for name, i in references]
        size = self._work.config.train.micro_batch_size
        trained = [i for i in places if i not in self._mastered]
        mastered = [i for i in places if i in self._mastered]
        return (
            micro_batches(trained, self._lengths, size),
            micro_batches(mastered, self._lengths, size),
        )

    def _cost_of(self, batch: Step) -> TokenCost:
        return TokenCost.of_batches([[self._lengths[i] for i in micro] for micro in batch])

    def _reset_totals(self) -> None:
        self._losses = torch.zeros((), device=self._work.accelerator.device)
        self._lr, self._grad_norm, self._targets = 0.0, None, 0
        self._cost, self._forward_cost = TokenCost(), TokenCost()
        self._seconds = 0.0
