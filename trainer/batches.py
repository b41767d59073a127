"""Which examples an optimizer step trains on: a pure function of the seed and the position.

An epoch of the active mixture is one permutation of all its examples, cut into optimizer steps; a
last, smaller step takes what is left over. The permutation depends on the seed, the stage, the
epoch and how many examples there are, and on nothing else, so the data position needs no state: the
step within the stage says it all, and no method trains on other batches than another one.

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
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """The order in which a stage takes the examples of its active sub-datasets."""

    seed: int
    stage: int
    """The stage that names the permutations, the first one of those that were continued."""
    sizes: Mapping[str, int]
    """Examples of each active sub-dataset, in a fixed order."""
    batch_size: int
    epoch: int
    """The epoch that is begun with, or gone on with, from 0."""
    left: tuple[Reference, ...]
    """The examples of that epoch that are to come."""

    @classmethod
    def fresh(
        cls, *, seed: int, stage: int, sizes: Mapping[str, int], batch_size: int
    ) -> DataOrder:
        """Return the order of a stage that begins anew."""
        left = _epoch(seed, stage, 0, tuple(sizes.items()))
        return cls(seed=seed, stage=stage, sizes=sizes, batch_size=batch_size, epoch=0, left=left)

    def step(self, step: int) -> tuple[Reference, ...]:
        """Return the examples of optimizer step ``step`` (from 0)."""
        return self._rest(step)[1][: self.batch_size]

    def continued(self, *, step: int, active: Sequence[str]) -> DataOrder:
        """Return the order that goes on before step ``step``, with ``active`` ones only."""
        epoch, rest = self._rest(step)
        return DataOrder(
            seed=self.seed,
            stage=self.stage,
            sizes={name: self.sizes[name] for name in active},
            batch_size=self.batch_size,
            epoch=epoch,
            left=tuple(reference for reference in rest if reference[0] in active),
        )

    def _rest(self, step: int) -> tuple[int, tuple[Reference, ...]]:
        """Return the epoch of a step and its examples from there on."""
        begun = -(-len(self.left) // self.batch_size)
        if step < begun:
            return self.epoch, self.left[step * self.batch_size :]
        per_epoch = -(-sum(self.sizes.values()) // self.batch_size)
        later, place = divmod(step - begun, per_epoch)
        epoch = self.epoch + 1 + later
        examples = _epoch(self.seed, self.stage, epoch, tuple(self.sizes.items()))
        return epoch, examples[place * self.batch_size :]


@lru_cache(maxsize=2)
def _epoch(
    seed: int, stage: int, epoch: int, sizes: tuple[tuple[str, int], ...]
) -> tuple[Reference, ...]:
    """Return all examples in the order of an epoch."""
    examples = [(name, i) for name, size in sizes for i in range(size)]
    generator = np.random.Generator(np.random.PCG64([seed, stage, epoch]))
    return tuple(examples[i] for i in generator.permutation(len(examples)).tolist())


def micro_batches(
    positions: Sequence[int], lengths: Sequence[int], micro_batch_size: int
) -> tuple[MicroBatch, ...]:
    """Cut ``positions`` into as few micro-batches as possible, alike in length, longest first.

    The longest come first so that memory reaches its maximum at once, not late in a run. Equal
    lengths are ordered by position.
    """
    order = sorted(positions, key=lambda position: (-lengths[position], position))
    count = -(-len(order) // micro_batch_size)
    sizes = [len(order) // count + (i < len(order) % count) for i in range(count)]
    cuts = np.cumsum([0, *sizes]).tolist()
    return tuple(tuple(order[a:b]) for a, b in itertools.pairwise(cuts))
