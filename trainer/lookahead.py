"""What one optimizer step on a sub-dataset alone would bring; the step leaves no trace.

For DynamixSFT (arXiv 2508.12116). Weights, the optimizer's state and torch's random number
generators are put back to the last bit, for which copies of them are held meanwhile. Every process
does the same, so that nothing has to be told.

Example::

    rewards, cost = look_ahead(work, stage, step=50, lr=1e-5, examples=16)
    rewards["arith"]                        # the mean share of an example's loss that would go
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.batches import micro_batches
from trainer.data import Example
from trainer.forward import collate, target_losses
from trainer.optim import set_learning_rate
from trainer.strategy import Stage
from trainer.workspace import Workspace


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
