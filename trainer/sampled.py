"""Examples drawn by weights that change in the course of a stage.

Each example of a step comes from a sub-dataset that is drawn by the weights, and is the next one in
an endless row of permutations of that sub-dataset. Everything follows from the seed, the stage and
the weights with the steps from which they hold, so a stage that is taken up in its middle
draws what it would have drawn.

Example::

    order = SampledOrder(seed=0, stage=1, sizes={"arith": 900, "dates": 80}, batch_size=64)
    order.step(0)
    order.reweigh(50, {"arith": 0.7, "dates": 0.3})     # from step 50 on
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from trainer.batches import Reference


class SampledOrder:
    """The order in which a stage draws its examples; steps are asked for in ascending order."""

    def __init__(
        self,
        *,
        seed: int,
        stage: int,
        sizes: Mapping[str, int],
        batch_size: int,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Begin with the proportions of ``counts``, by default the sizes.

        As many examples make an epoch as are counted, so its last step may be smaller.
        """
        counts = sizes if counts is None else counts
        self._seed, self._stage, self._batch_size = seed, stage, batch_size
        self._sizes = dict(sorted(sizes.items()))
        self._examples = sum(counts.values())
        begin = {name: counts[name] / self._examples for name in self._sizes}
        self._weights: list[tuple[int, Mapping[str, float]]] = [(0, begin)]
        self._rows = {
            name: self._row(number, size) for number, (name, size) in enumerate(self._sizes.items())
        }
        self._next = 0
        self._drawn: tuple[Reference, ...] = ()

    def reweigh(self, step: int, weights: Mapping[str, float]) -> None:
        """Draw by other weights from a step on, which is not drawn yet."""
        if step < self._next:
            raise ValueError(f"step {step} is drawn already, the next one is {self._next}")
        self._weights.append((step, weights))

    def step(self, step: int) -> tuple[Reference, ...]:
        """Return the examples of optimizer step ``step`` (from 0), the last one or a later one."""
        if step < self._next - 1:
            raise ValueError(f"step {step} lies behind, the last one was {self._next - 1}")
        while self._next <= step:
            self._drawn = self._draw(self._next)
            self._next += 1
        return self._drawn

    def _draw(self, step: int) -> tuple[Reference, ...]:
        weights = next(held for since, held in reversed(self._weights) if since <= step)
        names = list(self._sizes)
        chances = np.array([weights[name] for name in names])
        per_epoch = -(-self._examples // self._batch_size)
        left = self._examples - step % per_epoch * self._batch_size
        generator = np.random.Generator(np.random.PCG64([self._seed, self._stage, step, 0, 1]))
        size = min(left, self._batch_size)
        drawn = generator.choice(len(names), size=size, p=chances / chances.sum())
        return tuple((names[i], next(self._rows[names[i]])) for i in drawn)

    def _row(self, number: int, size: int) -> Iterator[int]:
        for turn in itertools.count():
            generator = np.random.Generator(
                np.random.PCG64([self._seed, self._stage, turn, number])
            )
            yield from generator.permutation(size).tolist()
