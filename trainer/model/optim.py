"""Make the optimizer, and compute and set learning rates.

Example::

    optimizer = make_optimizer(config.train, model, seed=config.seed)
    set_learning_rate(optimizer, learning_rate(config.train, step=0, steps=100))
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.config.schema import TrainConfig
from trainer.model.stochastic_rounding import StochasticAdam, seed_steps


def make_optimizer(
    config: TrainConfig, model: torch.nn.Module, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Return Adam or AdamW over all trainable parameters, with weight decay on matrices only.

    Its state has the dtype of the weights, or 8 or 4 bits. The fused implementation does a step's
    arithmetic in one pass over memory and in a fixed order, so results are repeatable. ``seed`` is
    that of stochastic rounding.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind, options = _find_kind(config)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in trainable)
    optimizer: torch.optim.Optimizer = kind(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        **options,
    )
    if config.stochastic_rounding:
        seed_steps(optimizer, seed)
    return optimizer


def _find_kind(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """Return the class of the optimizer and its own options."""
    name, rounds = config.optimizer, config.stochastic_rounding
    if name.endswith("bit"):
        import torchao.optim  # noqa: PLC0415 - optional, and slow to import

        kind = getattr(torchao.optim, name.replace("adamw", "AdamW").replace("adam", "Adam"))
        return kind, {"bf16_stochastic_round": rounds}
    if rounds:
        return StochasticAdam, {"decoupled": name == "adamw"}
    return torch.optim.AdamW if name == "adamw" else torch.optim.Adam, {}


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
        if isinstance(group["lr"], torch.Tensor):  # part of a compiled step
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
