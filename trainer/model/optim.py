"""Make the optimizer, and compute and set learning rates.

Example::

    optimizer = make_optimizer(config.train, model)
    set_learning_rate(optimizer, learning_rate(config.train, step=0, steps=100))
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.config.schema import TrainConfig


def make_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return Adam or AdamW over all trainable parameters, with weight decay on matrices only.

    Its state has the dtype of the weights. The fused implementation does a step's arithmetic in one
    pass over memory and in a fixed order, so results are repeatable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in trainable),
    )


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Delete all state and gradients of an optimizer."""
    optimizer.state.clear()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(config: TrainConfig, *, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of a stage of ``steps``.

    After a linear warm-up it is constant, or falls to zero linearly or as a half cosine.
    """
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = lr
