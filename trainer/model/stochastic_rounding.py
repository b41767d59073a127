"""Adam whose bf16 weights are rounded up or down at random, so that no update is lost on average.

A bf16 weight has 8 significant bits. An update below 1/512 of the weight is lost if the result is
rounded to the nearest value, which is the fate of most updates at a learning rate of 1e-5. Rounded
at random, with the chance that the distance gives, the expected value of the weight is exact.

Invariant: the random numbers of a step follow from the run's seed and the number of the step alone,
so that all processes round alike and a resumed run rounds as the killed one did.

Example::

    optimizer = StochasticAdam(groups, lr=1e-5, decoupled=False)
    seed_steps(optimizer, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DROPPED = 16
"""Bits of a float32 that bf16 lacks."""


class StochasticAdam(torch.optim.Optimizer):
    """Adam or AdamW, computed in float32, with moments in the dtype of the weights."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool,
    ) -> None:
        """Create it; ``decoupled`` subtracts the weight decay from the weights, as AdamW does."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2), decay = float(state["step"]), group["betas"], group["weight_decay"]
        new, gradient = weight.float(), weight.grad.float()  # type: ignore[union-attr]
        if decay and self._decoupled:
            new = new * (1 - group["lr"] * decay)
        elif decay:
            gradient = gradient + decay * new
        mean = state["exp_avg"].float().lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp(gradient.square(), 1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        scale = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        new = new.addcdiv(mean, scale, value=-group["lr"] / (1 - beta1**step))
        weight.copy_(round_stochastically(new) if weight.dtype is torch.bfloat16 else new)


def round_stochastically(values: Tensor) -> Tensor:
    """Return float32 values as bf16, each up or down with a chance by its distance."""
    noise = torch.randint_like(values, 1 << _DROPPED, dtype=torch.int32)
    bits = values.view(torch.int32) + noise
    return (bits >> _DROPPED << _DROPPED).view(torch.float32).to(torch.bfloat16)


def seed_steps(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Let the random numbers of each step follow from the seed and the number of the step."""
    outer = ExitStack()

    def begin(*_: Any) -> None:
        step = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        others = [device for device in devices if device.type == "cuda"]
        outer.enter_context(torch.random.fork_rng(devices=others))
        torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(lambda *_: outer.close())
