"""Which examples an optimizer step trains on: a pure function of the seed and the position.

An epoch of the active mixture is one permutation of all its examples, cut into optimizer steps; a
last, smaller step takes what is left over. The permutation depends on the seed, the stage, the
epoch and how many examples there are, and on nothing else, so the data position needs no state: the
step within the stage says it all, and no method trains on other batches than another one.

Within an optimizer step examples are sorted by length and cut into micro-batches, so that a short
example is rarely padded to the length of a long one. The steps themselves stay uniform random
samples: sorting across steps would make steps of one sub-dataset each, because lengths
differ between sub-datasets more than within them.

Example::

    steps = epoch_plan(
        seed=0, stage=1, epoch=0, lengths=lengths, batch_size=64, micro_batch_size=16
    )
    steps[0]                    # ((17, 4, …), (…), …): micro-batches of positions in ``lengths``
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

MicroBatch = tuple[int, ...]
"""Positions of examples in the mixture, longest first."""
Step = tuple[MicroBatch, ...]
"""The micro-batches of one optimizer step."""


def epoch_plan(
    *,
    seed: int,
    stage: int,
    epoch: int,
    lengths: Sequence[int],
    batch_size: int,
    micro_batch_size: int,
) -> tuple[Step, ...]:
    """Return the optimizer steps of epoch ``epoch`` (from 0) of stage ``stage``.

    ``lengths`` are the tokens of each example of the active mixture, in a fixed order.
    """
    generator = np.random.Generator(np.random.PCG64([seed, stage, epoch]))
    order = generator.permutation(len(lengths)).tolist()
    return tuple(
        micro_batches(order[start : start + batch_size], lengths, micro_batch_size)
        for start in range(0, len(order), batch_size)
    )


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
