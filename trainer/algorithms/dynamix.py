"""DynamixSFT: a bandit that samples more from sub-datasets on which a step reduces the loss more.

After Shin et al., 2025 (arXiv 2508.12116). ``docs/ALGORITHMS.md`` has the formulas, with r_k for
the reward of sub-dataset k, Q_k for its value, and p_k for the probability that it is drawn.

Example::

    strategy = Dynamix(sub_datasets={"arith": 900, "dates": 80}, mode="max", compute_budget=3.0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainer.algorithms.base import Adjustment, LookAhead, Observation, Stage
from trainer.algorithms.sft import Sft
from trainer.config.schema import DynamixConfig


@dataclass(kw_only=True, eq=False)
class Dynamix(Sft):
    """Sample by a bandit over sub-datasets (arXiv 2508.12116).

    Attributes:
        sub_datasets: Sub-dataset → number of its examples, in any unit common to all.
        settings: The section ``dynamix`` of the configuration.
        examples: Examples of each sub-dataset in a probe.
    """

    sub_datasets: Mapping[str, float]
    settings: DynamixConfig = field(default_factory=DynamixConfig)
    examples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        total = math.fsum(self.sub_datasets.values())
        self._prior = {name: size / total for name, size in sorted(self.sub_datasets.items())}
        self._values = dict.fromkeys(self._prior, 0.0)

    def first_stage(self) -> Stage:
        """Return a stage on the whole mixture that tries a step every T steps."""
        probes = LookAhead(every=self.settings.every, examples=self.examples)
        return replace(super().first_stage(), observe=probes)

    def on_observation(self, observation: Observation) -> Adjustment:
        """Update the values from the rewards and return the new probabilities."""
        rewards = rescale_rewards({name: observation.values[name][0] for name in self._prior})
        alpha, beta, gamma = self.settings.alpha, self.settings.beta, self.settings.gamma
        for name, reward in rewards.items():
            self._values[name] = alpha * self._values[name] + (1 - alpha) * reward
        weights = probabilities(self._values, self._prior, beta=beta, gamma=gamma)
        most = max(weights, key=lambda name: (weights[name], name))
        return Adjustment(
            weights=weights,
            reason=f"most is drawn from {most}, {weights[most]:.1%}; a step brings most there: "
            f"{max(rewards, key=lambda name: (rewards[name], name))}",
        )


def rescale_rewards(rewards: Mapping[str, float]) -> dict[str, float]:
    """Scale rewards to [0, 1]; non-finite rewards, and all rewards if equal, become 0."""
    finite = [reward for reward in rewards.values() if math.isfinite(reward)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if high == low:
        return dict.fromkeys(rewards, 0.0)
    return {
        name: (reward - low) / (high - low) if math.isfinite(reward) else 0.0
        for name, reward in rewards.items()
    }


def probabilities(
    values: Mapping[str, float], prior: Mapping[str, float], *, beta: float, gamma: float
) -> dict[str, float]:
    """Return p_k for the values Q_k and the prior p0_k."""
    top = max(values.values())
    # Exponents are relative to the largest one, so that none overflows.
    scores = {name: math.exp(beta * (values[name] - top)) * prior[name] for name in prior}
    total = math.fsum(scores.values())
    uniform = gamma / len(prior)
    return {name: (1 - gamma) * score / total + uniform for name, score in scores.items()}
