"""What changed between two chunks, in PyTorch operations on any device: the reference.

An element's *class* is the exponent of its reference, which a decoder knows: whether a weight
changes, and by how many steps, depends on it above all, as a small update vanishes in a large
weight. *Busy* elements, those of small exponents of which many change, are all listed; of the
others, the quiet ones, only those that changed, by the gaps between them. A change is a *token*
(its distance in steps below 4, then half octaves), its low bits, whether it goes towards zero and
whether the sign flipped. ``docs/FORMAT.md``, section 5, codec 6.

Example::

    found = find(new, old, layout)       # int16 or int32 tensors of one shape, on one device
    positions = place(old, layout, blocks, limit, quiet)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msft_store.codec import rans
from msft_store.codec.rans import BLOCK, EXPONENTS
from msft_store.format.dtypes import DType

Array = NDArray[Any]

RUN_CONTEXT, GAP_CONTEXT, FIRST_CLASS = 0, 1, 2
DIRECT_TOKENS = 4
"""Distances below are tokens themselves."""
_MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "complex32": 10, "complex64": 23}
TOKENS = 64
EXTRA_BITS = np.array(
    [0] * DIRECT_TOKENS + [(t - DIRECT_TOKENS) // 2 + 1 for t in range(DIRECT_TOKENS, TOKENS)], "u1"
)
"""Low bits that follow each token."""
SMALLEST = np.array(
    [*range(DIRECT_TOKENS)]
    + [(2 | t & 1) << (t - DIRECT_TOKENS) // 2 + 1 for t in range(DIRECT_TOKENS, TOKENS)],
    "u8",
).astype(np.uint32)
"""The smallest distance of each token; tokens from 62 up stand for none."""


@dataclass(frozen=True, kw_only=True)
class FloatLayout:
    """Where sign, exponent and mantissa of a lane are."""

    shift: int
    """Bits of the mantissa."""
    mask: int
    """All bits but the sign."""

    @property
    def sign(self) -> int:
        """The sign bit."""
        return self.mask + 1


@dataclass(frozen=True, kw_only=True)
class ChunkChanges:
    """The changes of one chunk, on the host."""

    busy: int
    """Exponents below are busy."""
    low: int
    high: int
    """Exponents at or beyond these share a class."""
    runs: Array | None
    """Lengths of runs of unchanged and changed blocks in turn, or ``None``: all are coded."""
    gaps: Array
    """Elements between each quiet one that changed and the one before it."""
    symbols: Array
    """``context << 8 | token << 2 | towards zero << 1 | sign flipped`` of all listed; uint16."""
    distances: Array
    """Steps between the magnitudes of all listed; uint32."""


def float_layout(dtype: DType) -> FloatLayout | None:
    """Return the layout of a type's lanes; ``None`` if they are no floats of 2 or 4 bytes."""
    shift = _MANTISSA.get(dtype.name)
    return None if shift is None else FloatLayout(shift=shift, mask=(1 << 8 * dtype.lane - 1) - 1)


def find_changes(new: torch.Tensor, old: torch.Tensor, layout: FloatLayout) -> ChunkChanges:
    """Return what changed, for the host to code; ``new`` and ``old`` are int16 or int32."""
    differs = new != old
    blocks, counts, runs = survey_blocks(differs, old, layout)
    step = rans.sampling_step(blocks.numel())
    use, busy, low, high = rans.plan_listing(counts.cpu().numpy(), runs, step)
    coded = blocks if use else torch.ones_like(blocks)
    listed = differs | is_busy(old, layout, busy << layout.shift)
    positions = (listed & expand_to_elements(coded, new.numel())).nonzero().squeeze(1)
    was = old[positions]
    quiet = positions[~is_busy(was, layout, busy << layout.shift)]
    ranks = coded.cumsum(0) - 1
    symbols, distances = compute_symbols(new[positions], was, layout, low, high)
    return ChunkChanges(
        busy=busy,
        low=low,
        high=high,
        runs=encode_runs(blocks.cpu().numpy()) if use else None,
        gaps=encode_gaps((ranks[quiet // BLOCK] * BLOCK + quiet % BLOCK).cpu().numpy()),
        symbols=symbols.cpu().numpy().astype(np.uint16),
        distances=distances.cpu().numpy().astype(np.uint32),
    )


def survey_blocks(
    differs: torch.Tensor, old: torch.Tensor, layout: FloatLayout
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the changed blocks, and the counts and runs that a plan takes."""
    rows = split_into_blocks(differs)
    # Eight at once, as PyTorch is slow to reduce single booleans.
    blocks = rows.view(torch.int64).amax(1) != 0
    step = rans.sampling_step(blocks.numel())
    exponents = (split_into_blocks(old)[::step].long() & layout.mask) >> layout.shift
    kinds = blocks[::step, None].long() + rows[::step].long()
    cells = (kinds * EXPONENTS + exponents).view(-1)
    if (blocks.numel() - 1) % step == 0:
        cells = cells[: cells.numel() - -old.numel() % BLOCK]
    same, kept, moved = torch.bincount(cells, minlength=3 * EXPONENTS).view(3, EXPONENTS)
    runs = int((blocks[1:] != blocks[:-1]).sum() + blocks[:1].sum())
    return blocks, torch.stack([same, kept + moved, moved]), runs


def split_into_blocks(elements: torch.Tensor) -> torch.Tensor:
    """Return elements as rows of a block each, with zeros at the end."""
    short = -elements.numel() % BLOCK
    padded = torch.nn.functional.pad(elements, (0, short)) if short else elements
    return padded.view(-1, BLOCK)


def is_busy(old: torch.Tensor, layout: FloatLayout, limit: int) -> torch.Tensor:
    """Return which references are of smaller magnitude than ``limit``."""
    # The limit may not fit the type.
    return (old & layout.mask) <= min(limit - 1, layout.mask)


def expand_to_elements(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Return what holds for each block for each of its elements."""
    return blocks[:, None].expand(-1, BLOCK).reshape(-1)[:count]


def compute_symbols(
    new: torch.Tensor, old: torch.Tensor, layout: FloatLayout, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symbols and distances of elements, int64."""
    was, now = old.long(), new.long()
    change = (now & layout.mask) - (was & layout.mask)
    contexts = (((was & layout.mask) >> layout.shift).clamp(low, high) - low) + FIRST_CLASS
    distances = change.abs()
    flipped = ((was ^ now) & layout.sign) != 0
    symbols = (
        contexts << 8 | compute_tokens(distances) << 2 | (change < 0).long() << 1 | flipped.long()
    )
    return symbols, distances


def compute_tokens(distances: torch.Tensor) -> torch.Tensor:
    """Return the tokens of distances, int64: a float's bits hold the octave and its half."""
    halves = (distances.double().view(torch.int64) >> 51) - 2046
    return torch.where(distances < DIRECT_TOKENS, distances, halves)


def locate_listed(
    old: torch.Tensor, layout: FloatLayout, blocks: torch.Tensor, limit: int, quiet: torch.Tensor
) -> torch.Tensor:
    """Return the positions of all listed elements, int64.

    ``quiet`` is int64, counted in the marked blocks only; :class:`ValueError` if one is beyond.
    """
    listed = is_busy(old, layout, limit) & expand_to_elements(blocks, old.numel())
    at = blocks.nonzero().squeeze(1)
    if quiet.numel():
        if int(quiet[-1]) >= at.numel() * BLOCK:
            raise ValueError("a chunk changes elements beyond its end")
        positions = at[quiet // BLOCK] * BLOCK + quiet % BLOCK
        if int(positions[-1]) >= old.numel():
            raise ValueError("a chunk changes elements beyond its end")
        listed[positions] = True
    return listed.nonzero().squeeze(1)


def encode_runs(blocks: Array) -> Array:
    """Return the lengths of runs, an unchanged one (of 0 or more) first, the last one left out.

    What is left out is unchanged, or goes on to the end.
    """
    edges = np.flatnonzero(np.diff(blocks, prepend=False))
    lengths: Array = np.diff(edges, prepend=0)
    return lengths


def decode_runs(lengths: Array, count: int) -> Array:
    """Undo :func:`encode_runs`; :class:`ValueError` if there are more blocks than ``count``."""
    edges = np.cumsum(lengths.astype(np.int64))
    if edges.size and edges[-1] >= count:
        raise ValueError("a chunk has runs beyond its end")
    turns = np.zeros(count, np.int8)
    np.add.at(turns, edges, 1)
    blocks: Array = np.cumsum(turns) % 2 == 1
    return blocks


def encode_gaps(positions: Array) -> Array:
    """Return how many elements stand before each, since the one before it; positions ascend."""
    gaps: Array = np.diff(positions.astype(np.int64), prepend=-1) - 1
    return gaps


def decode_gaps(gaps: Array) -> Array:
    """Undo :func:`encode_gaps`."""
    positions: Array = np.cumsum(gaps.astype(np.int64) + 1) - 1
    return positions
