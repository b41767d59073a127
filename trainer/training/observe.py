"""What one optimizer step on a sub-dataset alone would bring; the step leaves no trace.

For DynamixSFT (arXiv 2508.12116). Weights, the optimizer's state and torch's random number
generators are put back to the last bit, for which copies of them are held meanwhile. Every process
does the same, so that nothing has to be told.

Example::

    rewards, cost = look_ahead(work, stage, step=50, lr=1e-5, examples=16)
    rewards["arith"]                        # the mean share of an example's loss that would go

A stage that its strategy watches: losses and looks ahead are recorded, answered and acted on.

What is found is written before the strategy is asked, and its answer before it is acted on, so that
a resume tells it the same and gets the same.

Example::

    observing = Observing(work, strategy, together)
    observing.begin(stage, steps, schedule, observed)
    if observing.is_due(step=position.step):
        observing.observe(position)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.algorithms.base import Adjustment, ExampleLosses, LookAhead, Stage, Strategy
from trainer.data.batches import micro_batches
from trainer.data.examples import Example
from trainer.data.schedule import Schedule
from trainer.distributed import RunProcesses
from trainer.model.forward import collate, target_losses
from trainer.model.optim import set_learning_rate
from trainer.training.replay import Observed, Position, describe_adjustment
from trainer.training.steps import StageSteps
from trainer.training.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class LookCost:
    """Tokens that went through a forward and a backward pass, and once more through a forward one;
    see :mod:`trainer.journal` for the words."""

    tokens: int
    attention_tokens: int
    padded_tokens: int


def look_ahead(
    work: Workspace, stage: Stage, *, step: int, lr: float, examples: int
) -> tuple[dict[str, float], LookCost]:
    """Return each sub-dataset's reward at a step of a stage, and the cost of finding out.

    The reward is the mean over ``examples`` examples of 1 - L'/L, where L and L' are an example's
    loss before and after one step on these examples alone. It may not be finite.
    """
    train = work.split("train")
    rewards = {}
    tokens = attention_tokens = padded_tokens = 0
    for number, name in enumerate(stage.trained):
        seed = (work.config.seed, stage.number, step, number)
        places = _drawn(seed, len(train[name]), examples)
        chosen = [train[name][i] for i in places]
        rewards[name] = _reward(work, chosen, lr)
        lengths = [len(example) for example in chosen]
        tokens += sum(lengths)
        attention_tokens += sum(length * length for length in lengths)
        for micro in micro_batches(range(len(chosen)), lengths, work.config.train.micro_batch_size):
            longest = max(lengths[i] for i in micro)
            padded_tokens += sum(longest - lengths[i] for i in micro)
    cost = LookCost(tokens=tokens, attention_tokens=attention_tokens, padded_tokens=padded_tokens)
    return rewards, cost


def _drawn(seed: Sequence[int], size: int, examples: int) -> Sequence[int]:
    generator = np.random.Generator(np.random.PCG64([*seed, 2]))
    places: list[int] = generator.permutation(size)[:examples].tolist()
    return places


def _reward(work: Workspace, examples: Sequence[Example], lr: float) -> float:
    model: Any = work.accelerator.unwrap_model(work.model)
    targets = sum(len(example.completion) for example in examples)
    with _untouched(work.optimizer, work.accelerator.device):
        model.train()
        before = _losses(work, model, examples, targets=targets)
        if work.config.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), work.config.train.max_grad_norm)
        set_learning_rate(work.optimizer, lr)
        work.optimizer.step()
        work.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            after = _losses(work, model, examples)
    return float((1 - after / before).mean())


def _losses(
    work: Workspace, model: Any, examples: Sequence[Example], *, targets: int | None = None
) -> torch.Tensor:
    """Return each example's mean loss; with ``targets`` add the gradients of their mean."""
    lengths = [len(example) for example in examples]
    losses = torch.zeros(len(examples))
    for micro in micro_batches(range(len(examples)), lengths, work.config.train.micro_batch_size):
        rows = [examples[i] for i in micro]
        pad = work.loaded.pad_token_id
        tensors = collate(rows, pad_token_id=pad, device=work.accelerator.device)
        token_losses = target_losses(model, tensors)[0]
        if targets is not None:
            (token_losses.sum() / targets).backward()  # type: ignore[no-untyped-call]
        parts = torch.split(token_losses.detach(), [len(row.completion) for row in rows])
        losses[list(micro)] = torch.stack([part.mean() for part in parts]).float().cpu()
    return losses


@contextmanager
def _untouched(optimizer: Any, device: torch.device) -> Iterator[None]:
    """Put weights, optimizer state and torch's generators back at the end."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    held = [weight.detach().clone() for weight in weights]
    rates = [group["lr"] for group in optimizer.param_groups]
    states = {
        weight: {key: _copy(value) for key, value in optimizer.state[weight].items()}
        for weight in weights
        if weight in optimizer.state
    }
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for weight, copy in zip(weights, held, strict=True):
                    weight.copy_(copy)
            optimizer.state.clear()
            _put_back(optimizer.state, states)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _put_back(state: Any, states: Mapping[Any, Any]) -> None:
    for weight, values in states.items():
        state[weight] = values


class Observing:
    """Asks a strategy how a stage with ``observe`` goes on."""

    def __init__(self, work: Workspace, strategy: Strategy, together: RunProcesses) -> None:
        """Prepare; :meth:`begin` follows for each stage."""
        self._work = work
        self._strategy = strategy
        self._together = together

    def begin(
        self, stage: Stage, steps: StageSteps, schedule: Schedule, observed: Observed
    ) -> None:
        """Begin a stage, or go on with one in which so much was ``observed``."""
        self._stage, self._steps, self._schedule = stage, steps, schedule
        self._observed = observed
        for step, adjustment in observed.adjustments:
            steps.adjust(step, adjustment)

    def is_due(self, *, step: int) -> bool:
        """Say whether there is something to ask after so many steps of the stage."""
        watch = self._stage.observe
        if watch is None or step >= self._schedule.steps:
            return False
        every = self._schedule.steps_per_epoch if isinstance(watch, ExampleLosses) else watch.every
        return step % every == 0

    def observe(self, position: Position) -> None:
        """Find out, ask, and adjust what the stage trains on."""
        watch = self._stage.observe
        if isinstance(watch, LookAhead):
            self._look_ahead(position, watch)
        else:
            self.write_losses(position)
        answer: Adjustment | None = None
        if self._work.accelerator.is_main_process:
            observation = self._observed.observation(
                stage=position.stage,
                step=position.step,
                epoch=self._schedule.epoch(position.step),
            )
            answer = self._strategy.on_observation(observation)
            self._work.record(
                "adjusted",
                step=position.global_step,
                stage=position.stage,
                stage_step=position.step,
                epoch=observation.epoch,
                **describe_adjustment(answer),
                reason=answer.reason,
            )
        adjustment: Adjustment = self._together.share(answer)
        self._steps.adjust(position.step, adjustment)

    def write_losses(self, position: Position) -> None:
        """Record the losses of examples since the last time, so that a resume knows them."""
        told = self._steps.take_losses()
        if told is None:
            return
        places, values = told
        self._observed.add_losses(places, values)
        place = {"step": position.global_step, "stage": position.stage}
        self._work.record("losses", **place, places=places, values=values)

    def _look_ahead(self, position: Position, watch: LookAhead) -> None:
        began = time.monotonic()
        rewards, cost = look_ahead(
            self._work,
            self._stage,
            step=position.step,
            lr=self._steps.lr(position.step),
            examples=watch.examples,
        )
        values = {name: [reward] for name, reward in rewards.items()}
        self._observed.add_values(values)
        self._work.record(
            "looked_ahead",
            step=position.global_step,
            stage=position.stage,
            values=values,
            **vars(cost),
            seconds=time.monotonic() - began,
        )
