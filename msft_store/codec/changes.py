"""Find the changes between two chunks with PyTorch, on any device: the reference implementation.

The codecs 6, 7 and 9 code a change given the exponent of its reference, which a decoder knows. That
exponent says most about the change, because a small update vanishes in a large weight. Elements of
small exponents, of which many change, are *busy*: all of them are listed. Of the other, *quiet*
elements only the changed ones are listed, by the gaps between them. A change is a *token* (its
distance if below 4, then half or quarter octaves), low bits, a direction, and a bit that is 1 if
the sign flipped. ``docs/FORMAT.md``, section 5, defines the terms.

Example::

    changes = find_changes(new, old, layout)    # int16 or int32 tensors of one shape and device
    positions = locate_listed(old, layout, blocks, limit, quiet)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msft_store.codec import rans
from msft_store.codec.kernels import encode_gaps
from msft_store.codec.rans import BLOCK, EXPONENTS
from msft_store.format.dtypes import DType

Array = NDArray[Any]

RUN_CONTEXT, GAP_CONTEXT, FIRST_CLASS = 0, 1, 2
DIRECT_TOKENS = 4
"""Distances below this are their own tokens."""
_MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "complex32": 10, "complex64": 23}
TOKENS = 64


@functools.cache
def build_tokens(fine: int) -> tuple[Array, Array]:
    """Return the number of low bits that follow each token, and its smallest distance.

    ``fine`` is the number of bits of a distance below its highest one that a token holds, 1 or 2.
    """
    tokens = np.arange(TOKENS)
    bits = np.where(tokens < DIRECT_TOKENS, 0, (tokens >> fine) - 1)
    smallest = np.where(tokens < DIRECT_TOKENS, tokens, (1 << fine | tokens % (1 << fine)) << bits)
    # Half octaves from token 62 up are unused.
    return bits.astype(np.uint8), smallest.astype(np.uint64).astype(np.uint32)


EXTRA_BITS, SMALLEST = build_tokens(1)
"""The tokens of half octaves, which runs and gaps have, and all changes of older codecs."""


@dataclass(frozen=True, kw_only=True)
class FloatLayout:
    """The positions of sign, exponent and mantissa in a lane."""

    shift: int
    """Number of bits of the mantissa."""
    mask: int
    """Mask of all bits but the sign."""
    fine: int
    """See :func:`build_tokens`; quarter octaves suffice for 15 bits, half octaves for 31."""

    @property
    def sign(self) -> int:
        """The sign bit."""
        return self.mask + 1


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The rule for which elements are listed; quiet elements come by gaps."""

    busy: int
    """Elements with smaller exponents are busy."""
    low: int
    high: int
    """Exponents up to ``low`` share a context, and so do exponents from ``high`` up."""
    runs: Array | None
    """Alternating lengths of runs of skipped and coded blocks; ``None`` if all are coded."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The listed elements as the search in all elements met them. All others are unchanged."""

    positions: Array
    """Ascending; uint32."""
    references: Array
    values: Array
    """The words of the reference and of the chunk, unsigned."""


@dataclass(frozen=True, kw_only=True)
class ChunkChanges(Listing):
    """The changes of one chunk, on the host."""

    gaps: Array
    """Number of elements between each changed quiet element and the one before it."""
    symbols: Array
    """``context << 8 | token << 2 | towards zero << 1 | sign flipped`` of listed ones; uint16."""
    distances: Array
    """Differences of the magnitudes of listed elements, in steps; uint32."""
    listed: Listed | None = None
    """The listed elements; ``None`` if they were not brought to the host."""


def zero_context(listing: Listing) -> int:
    """Return the context of references of zero, which follows those of the exponents."""
    return FIRST_CLASS + listing.high - listing.low + 1


def float_layout(dtype: DType) -> FloatLayout | None:
    """Return the layout of a type's lanes; ``None`` unless they are floats of 2 or 4 bytes."""
    shift = _MANTISSA.get(dtype.name)
    if shift is None:
        return None
    mask = (1 << 8 * dtype.lane - 1) - 1
    return FloatLayout(shift=shift, mask=mask, fine=2 if dtype.lane == 2 else 1)


def find_changes(new: torch.Tensor, old: torch.Tensor, layout: FloatLayout) -> ChunkChanges:
    """Return the changes for the host to encode; ``new`` and ``old`` are int16 or int32."""
    differs = new != old
    blocks, counts, runs = survey_blocks(differs, old, layout)
    step = rans.sampling_step(blocks.numel())
    skip, busy, low, high = rans.plan_listing(counts.cpu().numpy(), runs, step)
    coded = blocks if skip else torch.ones_like(blocks)
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
        runs=encode_runs(blocks.cpu().numpy()) if skip else None,
        gaps=encode_gaps((ranks[quiet // BLOCK] * BLOCK + quiet % BLOCK).cpu().numpy()),
        symbols=symbols.cpu().numpy().astype(np.uint16),
        distances=distances.cpu().numpy().astype(np.uint32),
    )


def survey_blocks(
    differs: torch.Tensor, old: torch.Tensor, layout: FloatLayout
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a mask of changed blocks, and the counts and runs that a plan takes."""
    rows = split_into_blocks(differs)
    # Eight booleans are reduced as one integer, because PyTorch is slow on single ones.
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
    """Return elements as rows of one block each, padded with zeros."""
    short = -elements.numel() % BLOCK
    padded = torch.nn.functional.pad(elements, (0, short)) if short else elements
    return padded.view(-1, BLOCK)


def is_busy(old: torch.Tensor, layout: FloatLayout, limit: int) -> torch.Tensor:
    """Return a mask of the references whose magnitude is below ``limit``."""
    # The limit is clamped because it may not fit the type.
    return (old & layout.mask) <= min(limit - 1, layout.mask)


def expand_to_elements(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Return the value of each block once for each of its elements."""
    return blocks[:, None].expand(-1, BLOCK).reshape(-1)[:count]


def compute_symbols(
    new: torch.Tensor, old: torch.Tensor, layout: FloatLayout, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symbols and distances of elements, int64."""
    was, now = old.long(), new.long()
    change = (now & layout.mask) - (was & layout.mask)
    contexts = (((was & layout.mask) >> layout.shift).clamp(low, high) - low) + FIRST_CLASS
    contexts[(was & layout.mask) == 0] = FIRST_CLASS + high - low + 1
    distances = change.abs()
    flipped = ((was ^ now) & layout.sign) != 0
    symbols = (
        contexts << 8
        | compute_tokens(distances, layout.fine) << 2
        | (change < 0).long() << 1
        | flipped.long()
    )
    return symbols, distances


def compute_tokens(distances: torch.Tensor, fine: int) -> torch.Tensor:
    """Return the tokens of distances, int64, read off the exponent and top bits of a float64."""
    parts = (distances.double().view(torch.int64) >> 52 - fine) - first_part(fine)
    return torch.where(distances < DIRECT_TOKENS, distances, parts)


def first_part(fine: int) -> int:
    """Return what the token of a float64 lacks to its exponent and its ``fine`` highest bits."""
    return (1025 << fine) - DIRECT_TOKENS


def locate_listed(
    old: torch.Tensor, layout: FloatLayout, blocks: torch.Tensor, limit: int, quiet: torch.Tensor
) -> torch.Tensor:
    """Return the positions of all listed elements, int64.

    ``quiet`` (int64) counts elements of the marked blocks only; :class:`ValueError` beyond them.
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
    """Return alternating lengths of unchanged and changed runs of blocks, without the last run.

    The first run is unchanged and may be empty. The last run extends to the end.
    """
    edges = np.flatnonzero(np.diff(blocks, prepend=False))
    lengths: Array = np.diff(edges, prepend=0)
    return lengths


def decode_runs(lengths: Array, count: int) -> Array:
    """Undo :func:`encode_runs`; :class:`ValueError` if the runs exceed ``count`` blocks."""
    edges = np.cumsum(lengths.astype(np.int64))
    if edges.size and edges[-1] >= count:
        raise ValueError("a chunk has runs beyond its end")
    flips = np.zeros(count, np.int8)
    np.add.at(flips, edges, 1)
    blocks: Array = np.cumsum(flips) % 2 == 1
    return blocks
