"""The optimizer steps of a stage, and the totals that the journal records of them.

The loss of a step is the mean over all target tokens of its batch, so neither the number of
micro-batches nor the number of processes changes what is learned. Processes take turns at the
micro-batches; one that has none left in the last turn adds a loss of zero. Examples that are
mastered go through the forward pass alone, which tells their loss; a step of nothing else leaves
the weights as they are.

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
from trainer.algorithms.divergence import NonFiniteNumber, not_finite
from trainer.data.batches import DataOrder, MicroBatch, Reference, SampledOrder, Step, micro_batches
from trainer.data.schedule import Schedule
from trainer.distributed import in_turns
from trainer.model.forward import collate, target_losses
from trainer.model.optim import learning_rate, set_learning_rate
from trainer.model.sharding import is_sharded
from trainer.training.workspace import Workspace


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
        """Prepare; the optimizer keeps the state that it has.

        ``steps_before`` are those that the learning rate's schedule has behind it, in earlier
        stages; it is stretched to end with this one.
        """
        train = work.split("train")
        names = stage.trained
        self._work = work
        self._stage = stage
        self._schedule = schedule
        self._order = order
        self._steps_before = steps_before
        self._examples = [example for name in names for example in train[name]]
        self._lengths = [len(example) for example in self._examples]
        starts = itertools.accumulate((len(train[name]) for name in names), initial=0)
        self._starts = dict(zip(names, starts, strict=False))
        self._mastered: frozenset[int] = frozenset()
        self._tells_losses = isinstance(stage.observe, ExampleLosses)
        self._told: list[tuple[Reference, float]] = []
        self._forget_totals()

    def train(self, step: int) -> NonFiniteNumber | None:
        """Do optimizer step ``step`` (from 0) of the stage, the same in all processes.

        Where the loss or the norm of the gradients is not finite, the weights stay as they were,
        and what was found is returned.
        """
        config, model, optimizer = self._work.config.train, self._work.model, self._work.optimizer
        references = self._order.step(step)
        batch, passed = self._parts(references)
        targets = sum(len(self._examples[i].completion) for micro in batch for i in micro)
        model.train()
        losses = torch.zeros(len(self._examples) if self._tells_losses else 0)
        loss = self._backward(batch, targets, losses)
        self._forward(passed, losses)
        self._tell(references, losses)
        self._losses += loss
        self._grad_norm = None
        if config.max_grad_norm is not None and batch:
            accelerator = self._work.accelerator
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._lr = self.lr(step)
        set_learning_rate(optimizer, self._lr)
        self._count(batch, passed, targets)
        finding = not_finite({"training loss": loss, "gradient norm": self._grad_norm})
        if finding is None and batch:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return finding

    def lr(self, step: int) -> float:
        """Return the learning rate of a step of the stage."""
        before = self._steps_before
        return learning_rate(
            self._work.config.train, step=before + step, steps=before + self._schedule.steps
        )

    def adjust(self, step: int, adjustment: Adjustment) -> None:
        """Follow an adjustment from a step on."""
        if adjustment.weights and isinstance(self._order, SampledOrder):
            self._order.reweigh(step, adjustment.weights)
        self._mastered = frozenset(
            self._starts[name] + i for name, places in adjustment.mastered.items() for i in places
        )

    def take_losses(self) -> tuple[dict[str, list[int]], dict[str, list[float]]] | None:
        """Return places and losses of the examples since the last call; ``None`` for none."""
        if not self._told:
            return None
        places: dict[str, list[int]] = {}
        values: dict[str, list[float]] = {}
        for (name, i), loss in self._told:
            places.setdefault(name, []).append(i)
            values.setdefault(name, []).append(loss)
        self._told = []
        return places, values

    def take_totals(self) -> dict[str, Any] | None:
        """Return the fields of a ``trained`` record since the last call; ``None`` for no step."""
        if not self._tokens + self._forward_tokens:
            return None
        totals = {
            "loss": float(self._losses) / self._targets if self._targets else None,
            "lr": self._lr,
            "grad_norm": None if self._grad_norm is None else float(self._grad_norm),
            "tokens": self._tokens,
            "attention_tokens": self._attention_tokens,
            "target_tokens": self._targets,
            "padded_tokens": self._padded,
            "forward_tokens": self._forward_tokens,
            "forward_attention_tokens": self._forward_attention_tokens,
            "forward_padded_tokens": self._forward_padded,
            "seconds": time.monotonic() - self._began,
        }
        self._forget_totals()
        return totals

    def restart_clock(self) -> None:
        """Leave the time since the last totals out: it went into something else."""
        self._began = time.monotonic()

    def _backward(self, batch: Step, targets: int, losses: torch.Tensor) -> torch.Tensor:
        """Add the batch's gradients; return its summed loss over all processes, float32."""
        accelerator, model = self._work.accelerator, self._work.model
        processes, rank = accelerator.num_processes, accelerator.process_index
        total = torch.zeros((), device=accelerator.device)
        turns = -(-len(batch) // processes)
        for turn in range(turns):
            mine = turn * processes + rank
            weight = 1.0 if mine < len(batch) else 0.0
            micro = batch[mine if weight else 0]
            # Unreduced, FSDP2 would keep the gradients of the whole model in every process.
            reduces = turn == turns - 1 or is_sharded(model)
            with nullcontext() if reduces else accelerator.no_sync(model):
                token_losses = self._token_losses(model, micro)
                loss = token_losses.sum() * weight
                # DDP averages gradients over processes, but the loss is a mean over all targets.
                accelerator.backward(loss * (processes / targets))
            if weight:
                self._note(micro, token_losses, losses)
            total += loss.detach()
        if processes > 1:
            total = accelerator.reduce(total, reduction="sum")
        return total

    def _forward(self, batch: Step, losses: torch.Tensor) -> None:
        """Note the losses of this process's share of a batch that is not trained on."""
        accelerator = self._work.accelerator
        # Outside of DDP, whose forward passes must be as many in every process.
        model = accelerator.unwrap_model(self._work.model)
        with torch.no_grad():
            for micro, mine in in_turns(batch, accelerator, alike=is_sharded(model)):
                token_losses = self._token_losses(model, micro)
                if mine:
                    self._note(micro, token_losses, losses)

    def _token_losses(self, model: Any, micro: MicroBatch) -> torch.Tensor:
        rows = [self._examples[i] for i in micro]
        pad = self._work.loaded.pad_token_id
        tensors = collate(rows, pad_token_id=pad, device=self._work.accelerator.device)
        return target_losses(model, tensors)[0]

    def _note(self, micro: MicroBatch, token_losses: torch.Tensor, losses: torch.Tensor) -> None:
        """Write down each example's mean loss, where somebody wants to know."""
        if not self._tells_losses:
            return
        sizes = [len(self._examples[i].completion) for i in micro]
        means = [part.mean() for part in torch.split(token_losses.detach(), sizes)]
        losses[list(micro)] = torch.stack(means).float().cpu()

    def _tell(self, references: Sequence[Reference], losses: torch.Tensor) -> None:
        if not self._tells_losses:
            return
        places = [self._starts[name] + i for name, i in references]
        mine = losses[places]
        accelerator = self._work.accelerator
        if accelerator.num_processes > 1:
            # Each example is with one process, so adding up is exact.
            mine = accelerator.reduce(mine.to(accelerator.device), reduction="sum").cpu()
        self._told += zip(references, mine.tolist(), strict=True)

    def _parts(self, references: Sequence[Reference]) -> tuple[Step, Step]:
        """Return the micro-batches that are trained on, and those of mastered examples."""
        positions = [self._starts[name] + i for name, i in references]
        size = self._work.config.train.micro_batch_size
        trained = [i for i in positions if i not in self._mastered]
        passed = [i for i in positions if i in self._mastered]
        return micro_batches(trained, self._lengths, size), micro_batches(
            passed, self._lengths, size
        )

    def _count(self, batch: Step, passed: Step, targets: int) -> None:
        self._targets += targets
        for micro in batch:
            lengths = [self._lengths[i] for i in micro]
            self._tokens += sum(lengths)
            self._attention_tokens += sum(length * length for length in lengths)
            self._padded += max(lengths) * len(lengths) - sum(lengths)
        for micro in passed:
            lengths = [self._lengths[i] for i in micro]
            self._forward_tokens += sum(lengths)
            self._forward_attention_tokens += sum(length * length for length in lengths)
            self._forward_padded += max(lengths) * len(lengths) - sum(lengths)

    def _forget_totals(self) -> None:
        self._losses = torch.zeros((), device=self._work.accelerator.device)
        self._lr, self._grad_norm = 0.0, None
        self._tokens = self._attention_tokens = self._targets = self._padded = 0
        self._forward_tokens = self._forward_attention_tokens = self._forward_padded = 0
        self._began = time.monotonic()
