"""DynamixSFT: a bandit that samples more from sub-datasets on which a step reduces the loss more.

After Shin et al., 2025 (arXiv 2508.12116). Every T steps the loop tries one optimizer step on a
mini-batch of each sub-dataset alone, and undoes it. The reward of sub-dataset k is the mean
relative reduction of its loss, scaled over the sub-datasets to [0, 1]. Then
Q_k ← alpha Q_k + (1 - alpha) r_k, and examples are drawn with probability

    p_k = (1 - gamma) exp(beta Q_k) p0_k / Σ_j exp(beta Q_j) p0_j + gamma / K

where p0 are the proportions of the mixture and K is the number of sub-datasets.

Example::

    strategy = Dynamix(sub_datasets={"arith": 900, "dates": 80}, mode="max", compute_budget=3.0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trainer.algorithms.base import Adjustment, LookAhead, Mode, Observation
from trainer.algorithms.sft import Sft


class Dynamix(Sft):
    """Sample by a bandit over sub-datasets (arXiv 2508.12116).

    Args:
        sub_datasets: Sub-dataset → number of its examples, in any unit common to all.
        mode: The direction in which the metric improves.
        compute_budget: Epochs of the mixture.
        gamma: Probability mass that is spread evenly over the sub-datasets.
        alpha: Weight of the past in a sub-dataset's value.
        beta: Inverse temperature of the softmax over values.
        every: T, optimizer steps between two probes.
        examples: Examples of each sub-dataset in a probe.
    """

    def __init__(
        self,
        *,
        sub_datasets: Mapping[str, float],
        mode: Mode,
        compute_budget: float,
        gamma: float = 0.3,
        alpha: float = 0.95,
        beta: float = 4.0,
        every: int = 50,
        examples: int = 16,
    ) -> None:
        """Start a run; see the class."""
        super().__init__(
            sub_datasets=sub_datasets,
            mode=mode,
            compute_budget=compute_budget,
            observe=LookAhead(every=every, examples=examples),
        )
        total = math.fsum(sub_datasets.values())
        self._prior = {name: size / total for name, size in sorted(sub_datasets.items())}
        self._values = dict.fromkeys(self._prior, 0.0)
        self._gamma, self._alpha, self._beta = gamma, alpha, beta

    def on_observation(self, observation: Observation) -> Adjustment:
        """Update the values from the rewards and return the new probabilities."""
        rewards = rescale_rewards({name: observation.values[name][0] for name in self._prior})
        for name, reward in rewards.items():
            self._values[name] = self._alpha * self._values[name] + (1 - self._alpha) * reward
        weights = probabilities(self._values, self._prior, beta=self._beta, gamma=self._gamma)
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
