"""Observe a stage for its strategy: losses of examples (IES) or probes (DynamixSFT).

A probe tries one optimizer step on one sub-dataset alone and measures the reward: the mean share of
the loss that the step removes (arXiv 2508.12116). Weights, the optimizer's state and torch's random
number generators are restored bit-exactly from copies. Every process makes the same probe, so the
processes exchange nothing.

Invariant: observations are journaled before the strategy is asked, and its answer before it is
applied, so that a resume gives the strategy the same observations and gets the same answers.

Example::

    observer = StageObserver(work, strategy)
    observer.begin_stage(steps, observations)
    if observer.is_due(step=position.step):
        observer.observe(position)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trainer.algorithms.base import Adjustment, ExampleLosses, LookAhead, Stage
from trainer.algorithms.method import Method
from trainer.data.batches import generator, micro_batches
from trainer.data.examples import Example
from trainer.distributed import share_decision
from trainer.model.forward import TokenCost, loss_count, mean_losses, summed_loss
from trainer.model.optim import set_learning_rate
from trainer.training.replay import ObservationLog, Position, describe_adjustment
from trainer.training.steps import StageSteps, compute_token_losses
from trainer.training.workspace import Workspace


class StageObserver:
    """Observes a stage and applies the adjustments of its strategy."""

    def __init__(self, work: Workspace, strategy: Method) -> None:
        self._work = work
        self._strategy = strategy

    def begin_stage(self, steps: StageSteps, observations: ObservationLog) -> None:
        """Begin a stage, or continue one with its earlier observations."""
        self._steps, self._observations = steps, observations
        for step, adjustment in observations.adjustments:
            steps.adjust(step, adjustment)

    def is_due(self, *, step: int) -> bool:
        """Return True if an observation is due after ``step`` steps of the stage."""
        observe, schedule = self._steps.stage.observe, self._steps.schedule
        if observe is None or step >= schedule.steps:
            return False
        every = schedule.steps_per_epoch if isinstance(observe, ExampleLosses) else observe.every
        return step % every == 0

    def observe(self, position: Position) -> None:
        """Journal the observation, ask the strategy, and adjust the training data of the stage."""
        observe = self._steps.stage.observe
        if isinstance(observe, LookAhead):
            self._probe(position, observe)
        else:
            self.write_losses(position)
        answer: Adjustment | None = None
        if self._work.accelerator.is_main_process:
            observation = self._observations.make_observation(
                stage=position.stage,
                step=position.step,
                epoch=self._steps.schedule.epoch(position.step),
            )
            answer = self._strategy.on_observation(observation)
            self._work.record(
                "adjusted",
                step=position.global_step,
                stage=position.stage,
                stage_step=position.step,
                epoch=observation.epoch,
                **describe_adjustment(answer),
            )
        adjustment: Adjustment = share_decision(answer)
        self._steps.adjust(position.step, adjustment)

    def write_losses(self, position: Position) -> None:
        """Journal the losses of examples since the last call, for a resume."""
        losses = self._steps.take_losses()
        if losses is None:
            return
        places, values = losses
        self._observations.add_losses(places, values)
        place = {"step": position.global_step, "stage": position.stage}
        self._work.record("losses", **place, places=places, values=values)

    def _probe(self, position: Position, look_ahead: LookAhead) -> None:
        began = time.monotonic()
        rewards, cost = probe_sub_datasets(
            self._work,
            self._steps.stage,
            step=position.step,
            lr=self._steps.lr(position.step),
            examples=look_ahead.examples,
        )
        values = {name: [reward] for name, reward in rewards.items()}
        self._observations.add_rewards(values)
        self._work.record(
            "looked_ahead",
            step=position.global_step,
            stage=position.stage,
            values=values,
            **vars(cost),
            seconds=time.monotonic() - began,
        )


def probe_sub_datasets(
    work: Workspace, stage: Stage, *, step: int, lr: float, examples: int
) -> tuple[dict[str, float], TokenCost]:
    """Return each sub-dataset's reward at a step of a stage, and the cost of one pass each.

    A probe makes a forward and a backward pass, and one more forward pass. The reward is the mean
    over ``examples`` examples of 1 - L'/L, with L and L' an example's loss before and after a step
    on these examples alone. It may not be finite.
    """
    train = work.split("train")
    rewards, cost = {}, TokenCost()
    for number, name in enumerate(stage.trained):
        draws = generator(work.config.seed, stage.number, step, number, 2)
        places = draws.permutation(len(train[name]))[:examples]
        drawn = [train[name][i] for i in places.tolist()]
        rewards[name] = _measure_reward(work, drawn, lr)
        micros = _split_examples(work, drawn)
        cost += TokenCost.of_batches([[len(drawn[i]) for i in micro] for micro in micros])
    return rewards, cost


def _measure_reward(work: Workspace, examples: Sequence[Example], lr: float) -> float:
    model: Any = work.accelerator.unwrap_model(work.model)
    with _restore_state(work.optimizer, work.accelerator.device):
        model.train()
        before = _compute_losses(work, model, examples, trains=True)
        if work.config.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), work.config.train.max_grad_norm)
        set_learning_rate(work.optimizer, lr)
        work.optimizer.step()
        work.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            after = _compute_losses(work, model, examples)
    return float((1 - after / before).mean())


def _compute_losses(
    work: Workspace, model: Any, examples: Sequence[Example], *, trains: bool = False
) -> torch.Tensor:
    """Return each example's mean loss; with ``trains``, add the gradients of the step's loss."""
    losses, average = torch.zeros(len(examples)), work.config.train.loss_average
    micros = _split_examples(work, examples)
    batch = [[examples[i] for i in micro] for micro in micros]
    count = loss_count(batch, average)
    for micro, rows in zip(micros, batch, strict=True):
        token_losses = compute_token_losses(work, model, rows)
        if trains:
            loss = summed_loss(token_losses, rows, average) / count
            loss.backward()  # type: ignore[no-untyped-call]
        losses[list(micro)] = mean_losses(token_losses, rows)
    return losses


def _split_examples(work: Workspace, examples: Sequence[Example]) -> Sequence[Sequence[int]]:
    lengths = [len(example) for example in examples]
    return micro_batches(range(len(examples)), lengths, work.config.train.micro_batch_size)


@contextmanager
def _restore_state(optimizer: Any, device: torch.device) -> Iterator[None]:
    """Restore weights, optimizer state and torch's generators at the end."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    copies = [weight.detach().clone() for weight in weights]
    state = copy.deepcopy(optimizer.state_dict())
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for weight, before in zip(weights, copies, strict=True):
                    weight.copy_(before)
            optimizer.load_state_dict(state)
