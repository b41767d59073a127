"""The order of training examples: a pure function of the seed and the position.

An epoch of the active mixture is one permutation of its examples, which depends only on the seed,
the stage, the epoch and the numbers of examples. It is cut into optimizer steps. So the step within
the stage is the whole data position, and all methods train on the same batches.

If a sub-dataset's share is not 1, an epoch takes its next ``counts`` examples from an endless
sequence of permutations, so that each example is used equally often. A sub-dataset with a limit is
left out from that epoch on, or keeps the share ``floor`` of its examples. An order may be continued
with other counts (``continued``): it takes the remaining examples of the epoch, in the same order
and as many of each sub-dataset as the new count allows, then the next epochs.

Within an optimizer step, examples are sorted by length and cut into micro-batches, which saves
padding. Across steps they are not, because a step would then have one sub-dataset only.

:class:`SampledOrder` draws the sub-dataset of each example by weights that may change during a
stage. The example is the next one in an endless sequence of permutations of that sub-dataset. The
draws depend only on the seed, the stage and the weights with their first steps, so a resumed stage
repeats them.

Example::

    order = DataOrder.fresh(seed=0, stage=1, sizes={"arith": 900, "dates": 80}, batch_size=64)
    order.step(0)                       # (("dates", 17), ("arith", 4), …)
    later = order.continued(step=10, sizes={"arith": 900}, counts={"arith": 900})
    micro_batches(positions, lengths, 16)
    order = SampledOrder(seed=0, stage=1, sizes={"arith": 900, "dates": 80}, batch_size=64)
    order.reweigh(50, {"arith": 0.7, "dates": 0.3})     # from step 50 on
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

Reference = tuple[str, int]
"""An example: its sub-dataset and its index there."""
MicroBatch = tuple[int, ...]
"""Indices of examples in the mixture, longest first."""
Step = tuple[MicroBatch, ...]


def generator(*words: int) -> np.random.Generator:
    """Return a random generator that follows from the words alone."""
    return np.random.Generator(np.random.PCG64(words))


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The order in which a stage takes the examples of its sub-datasets."""

    seed: int
    stage: int
    """The stage that seeds the permutations; the first one of continued stages."""
    sizes: Mapping[str, int]
    """Examples of each sub-dataset, in a fixed order."""
    counts: Mapping[str, int]
    limits: Mapping[str, float]
    """Sub-dataset → epoch from which it is left out; without an entry it is never left out."""
    floor: float
    """Share of its examples in an epoch that a sub-dataset keeps behind its limit."""
    batch_size: int
    epoch: int
    """The epoch that the order begins in, from 0."""
    left: tuple[Reference, ...]
    """The remaining examples of that epoch."""

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
        floor: float = 0.0,
    ) -> DataOrder:
        """Return the order of a new stage; ``counts`` are the sizes by default."""
        begun = cls(
            seed=seed,
            stage=stage,
            sizes=sizes,
            counts=sizes if counts is None else counts,
            limits=limits or {},
            floor=floor,
            batch_size=batch_size,
            epoch=0,
            left=(),
        )
        return replace(begun, left=begun._examples(0))

    def step(self, step: int) -> tuple[Reference, ...]:
        """Return the examples of optimizer step ``step`` (from 0)."""
        return self._rest(step)[1][: self.batch_size]

    def epoch_sizes(self, epochs: float) -> tuple[int, ...]:
        """Return the numbers of examples of the first epochs, including a partial last one."""
        return tuple(len(self._examples(epoch)) for epoch in range(math.ceil(epochs - 1e-9)))

    def continued(
        self, *, step: int, sizes: Mapping[str, int], counts: Mapping[str, int]
    ) -> DataOrder:
        """Return the order that continues before step ``step`` with other sizes and counts.

        A sub-dataset that has fewer examples in an epoch than before gets as large a part of those
        that the epoch has left. One that was not in it begins with the next epoch.
        """
        epoch, rest = self._rest(step)
        room = {
            name: math.ceil(n * min(1.0, counts.get(name, 0) / self.counts[name]))
            for name, n in Counter(name for name, _ in rest).items()
        }
        left = []
        for name, place in rest:
            if room[name] > 0:
                room[name] -= 1
                left.append((name, place))
        return replace(self, sizes=sizes, counts=counts, epoch=epoch, left=tuple(left))

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
        takes = tuple((name, size, self.counts[name]) for name, size in self.sizes.items())
        examples = _epoch(self.seed, self.stage, epoch, takes)
        if not self.limits:
            return examples
        ends = {
            name: (self.limits.get(name, math.inf) - epoch) * len(examples) - 1e-6
            for name in self.sizes
        }
        behind = dict.fromkeys(self.sizes, 0)

        def stays(place: int, name: str) -> bool:
            if place < ends[name]:
                return True
            # Of n examples behind the limit, ceil(n floor) stay, the first one among them.
            before = math.ceil(behind[name] * self.floor - 1e-9)
            behind[name] += 1
            return math.ceil(behind[name] * self.floor - 1e-9) > before

        return tuple(one for place, one in enumerate(examples) if stays(place, one[0]))


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
            row = generator(seed, stage, turn, number).permutation(size)
            begin, end = max(first - turn * size, 0), min(first + count - turn * size, size)
            examples += [(name, int(i)) for i in row[begin:end]]
    order = generator(seed, stage, epoch).permutation(len(examples))
    return tuple(examples[i] for i in order.tolist())


def micro_batches(
    positions: Sequence[int], lengths: Sequence[int], micro_batch_size: int
) -> tuple[MicroBatch, ...]:
    """Cut ``positions`` into as few micro-batches as possible, sorted by length, longest first.

    The longest come first so that memory use reaches its maximum at once. Equal lengths are ordered
    by position.
    """
    if not positions:
        return ()
    order = sorted(positions, key=lambda position: (-lengths[position], position))
    count = -(-len(order) // micro_batch_size)
    sizes = [len(order) // count + (i < len(order) % count) for i in range(count)]
    cuts = np.cumsum([0, *sizes]).tolist()
    return tuple(tuple(order[a:b]) for a, b in itertools.pairwise(cuts))


class SampledOrder:
    """The order in which a stage draws its examples; steps must be requested in ascending order."""

    def __init__(
        self,
        *,
        seed: int,
        stage: int,
        sizes: Mapping[str, int],
        batch_size: int,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Start with the proportions of ``counts``, by default the sizes.

        An epoch has ``sum(counts)`` examples, so its last step may be smaller.
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
        """Change the weights from a step on; it must not be drawn yet."""
        if step < self._next:
            raise ValueError(f"step {step} is drawn already, the next one is {self._next}")
        self._weights.append((step, weights))

    def step(self, step: int) -> tuple[Reference, ...]:
        """Return the examples of optimizer step ``step`` (from 0)."""
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
        size = min(left, self._batch_size)
        draws = generator(self._seed, self._stage, step, 0, 1)
        drawn = draws.choice(len(names), size=size, p=chances / chances.sum())
        return tuple((names[i], next(self._rows[names[i]])) for i in drawn)

    def _row(self, number: int, size: int) -> Iterator[int]:
        for turn in itertools.count():
            yield from generator(self._seed, self._stage, turn, number).permutation(size).tolist()
