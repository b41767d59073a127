"""Which examples an optimizer step trains on: a pure function of the seed and the position.

An epoch of the active mixture is one permutation of its examples, cut into optimizer steps; a last,
smaller step takes what is left over. The permutation depends on the seed, the stage, the epoch and
how many examples there are, and on nothing else, so the data position needs no state: the
step within the stage says it all, and no method trains on other batches than another one.

Of a sub-dataset with a share that is not 1 an epoch has more or fewer examples (``counts``): those
that come next in an endless row of permutations of it, so that each one's turn comes equally often.
One with a limit takes part up to that point in the data and is left out from there on.

A stage may also go on where an earlier one was (``continued``): first with the examples that were
left of the epoch, of those that are still active and in the same order, then with the next epochs.

Within an optimizer step examples are sorted by length and cut into micro-batches, so that a short
example is rarely padded to the length of a long one. The steps themselves stay uniform random
samples: sorting across steps would make steps of one sub-dataset each, because lengths
differ between sub-datasets more than within them.

Example::

    order = DataOrder.fresh(seed=0, stage=1, sizes={"arith": 900, "dates": 80}, batch_size=64)
    order.step(0)                       # (("dates", 17), ("arith", 4), …)
    later = order.continued(step=10, active=["arith"])
    micro_batches(positions, lengths, 16)

Examples drawn by weights that change in the course of a stage.

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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

Reference = tuple[str, int]
"""An example: its sub-dataset and its place in that, from 0."""
MicroBatch = tuple[int, ...]
"""Positions of examples in the mixture, longest first."""
Step = tuple[MicroBatch, ...]
"""The micro-batches of one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The order in which a stage takes the examples of its sub-datasets."""

    seed: int
    stage: int
    """The stage that names the permutations, the first one of those that were continued."""
    sizes: Mapping[str, int]
    """Examples of each sub-dataset, in a fixed order."""
    counts: Mapping[str, int]
    """How many of them an epoch has."""
    limits: Mapping[str, float]
    """Epochs after which a sub-dataset takes no part any more; it does to the end without one."""
    batch_size: int
    epoch: int
    """The epoch that is begun with, or gone on with, from 0."""
    left: tuple[Reference, ...]
    """The examples of that epoch that are to come."""

    @classmethod
    def fresh(
        cls,
        *,
        seed: int,
        stage: int,
        sizes: Mapping[str, int],
        batch_size: int,
        counts: Mapping[str, int] | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> DataOrder:
        """Return the order of a stage that begins anew; ``counts`` are the sizes by default."""
        begun = cls(
            seed=seed,
            stage=stage,
            sizes=sizes,
            counts=sizes if counts is None else counts,
            limits=limits or {},
            batch_size=batch_size,
            epoch=0,
            left=(),
        )
        return replace(begun, left=begun._examples(0))

    def step(self, step: int) -> tuple[Reference, ...]:
        """Return the examples of optimizer step ``step`` (from 0)."""
        return self._rest(step)[1][: self.batch_size]

    def epoch_sizes(self, epochs: float) -> tuple[int, ...]:
        """Return how many examples each of the first epochs has, begun ones included."""
        return tuple(len(self._examples(epoch)) for epoch in range(math.ceil(epochs - 1e-9)))

    def continued(self, *, step: int, active: Sequence[str]) -> DataOrder:
        """Return the order that goes on before step ``step``, with ``active`` ones only."""
        epoch, rest = self._rest(step)
        return replace(
            self,
            sizes={name: self.sizes[name] for name in active},
            counts={name: self.counts[name] for name in active},
            epoch=epoch,
            left=tuple(reference for reference in rest if reference[0] in active),
        )

    def _rest(self, step: int) -> tuple[int, tuple[Reference, ...]]:
        """Return the epoch of a step and its examples from there on."""
        epoch, left = self.epoch, self.left
        while step >= (steps := -(-len(left) // self.batch_size)):
            if not self.limits and epoch > self.epoch:
                ahead, step = divmod(step, steps)
                epoch += ahead - 1
            else:
                step -= steps
            epoch += 1
            left = self._examples(epoch)
            if not left:
                raise ValueError(f"epoch {epoch} of stage {self.stage} has no example left")
        return epoch, left[step * self.batch_size :]

    def _examples(self, epoch: int) -> tuple[Reference, ...]:
        """Return the examples of an epoch in their order."""
        takes = tuple((name, size, self.counts[name]) for name, size in self.sizes.items())
        examples = _epoch(self.seed, self.stage, epoch, takes)
        if not self.limits:
            return examples
        ends = {
            name: (self.limits.get(name, math.inf) - epoch) * len(examples) - 1e-6
            for name in self.sizes
        }
        return tuple(one for place, one in enumerate(examples) if place < ends[one[0]])


@lru_cache(maxsize=4)
def _epoch(
    seed: int, stage: int, epoch: int, takes: tuple[tuple[str, int, int], ...]
) -> tuple[Reference, ...]:
    """Return the examples of an epoch in their order; ``takes`` are names, sizes and counts."""
    examples = []
    for number, (name, size, count) in enumerate(takes):
        if count == size:
            examples += [(name, i) for i in range(size)]
            continue
        first = epoch * count
        for turn in range(first // size, -(-(first + count) // size)):
            row = np.random.Generator(np.random.PCG64([seed, stage, turn, number])).permutation(
                size
            )
            begin, end = max(first - turn * size, 0), min(first + count - turn * size, size)
            examples += [(name, int(i)) for i in row[begin:end]]
    generator = np.random.Generator(np.random.PCG64([seed, stage, epoch]))
    return tuple(examples[i] for i in generator.permutation(len(examples)).tolist())


def micro_batches(
    positions: Sequence[int], lengths: Sequence[int], micro_batch_size: int
) -> tuple[MicroBatch, ...]:
    """Cut ``positions`` into as few micro-batches as possible, alike in length, longest first.

    The longest come first so that memory reaches its maximum at once, not late in a run. Equal
    lengths are ordered by position.
    """
    if not positions:
        return ()
    order = sorted(positions, key=lambda position: (-lengths[position], position))
    count = -(-len(order) // micro_batch_size)
    sizes = [len(order) // count + (i < len(order) % count) for i in range(count)]
    cuts = np.cumsum([0, *sizes]).tolist()
    return tuple(tuple(order[a:b]) for a, b in itertools.pairwise(cuts))


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
