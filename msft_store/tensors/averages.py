"""Average tensors element by element, with weights.

Floats of 8 and 16 bits are summed in float32, those of 32 and 64 bits in float64, and the sum is
rounded once. Invariants: elements that are equal in all tensors keep their bits. Each element
depends on nothing but its own values, so the result is the same in any parts and with any number of
threads. Infinities and NaN follow IEEE 754; a NaN that is computed has the sign and payload of
torch's. Integers, booleans and the exponents of ``float8_e8m0fnu`` have no average: the last
tensor's stay.

Example::

    average_bytes([first, second], normalise_weights([3, 1], 2), dtype_by_name("bfloat16"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from msft_store.codec.kernels import Bytes
from msft_store.errors import InvalidInputError, MismatchError
from msft_store.format.dtypes import DType
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.tensors.bytes import torch_dtype

_LANES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size, to compare bits with."""


def normalise_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return the weights of ``count`` checkpoints, divided by their sum; all equal if ``None``.

    :class:`InvalidInputError` if there is not one finite number for each, with a positive sum.
    """
    if count == 0:
        raise InvalidInputError("an average needs at least one checkpoint")
    try:
        given = [1.0] * count if weights is None else [float(weight) for weight in weights]
        total = math.fsum(given)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(f"weights must be finite numbers, not {weights!r}") from None
    if len(given) != count:
        raise InvalidInputError(f"{len(given)} weights for {count} checkpoints: give one for each")
    shares = tuple(weight / total for weight in given) if total > 0 else ()
    if not shares or not all(map(math.isfinite, shares)):
        raise InvalidInputError(
            f"weights must be finite numbers with a positive sum, by which they are divided, not "
            f"{given}"
        )
    return shares


def check_alike(tables: Sequence[tuple[Checkpoint, Mapping[str, TensorEntry]]]) -> None:
    """Raise :class:`MismatchError` unless all checkpoints have the same tensors.

    The same are those of equal names, shapes and dtypes.
    """
    (first, expected), *others = ((f"checkpoint {c.id[:12]}", table) for c, table in tables)
    for other, table in others:
        for name in sorted(expected.keys() | table.keys()):
            one, two, problem = expected.get(name), table.get(name), None
            if one is None or two is None:
                has, lacks = (other, first) if one is None else (first, other)
                problem = f"{lacks} has no tensor {name!r}, which {has} has"
            elif (one.dtype, one.shape) != (two.dtype, two.shape):
                problem = (
                    f"{name!r} is {one.dtype.name} {one.shape} in {first} and {two.dtype.name} "
                    f"{two.shape} in {other}"
                )
            if problem is not None:
                raise MismatchError(
                    f"{problem}; average checkpoints of one model. Nothing was saved"
                )


def average_bytes(parts: Sequence[Bytes], weights: Sequence[float], dtype: DType) -> Bytes:
    """Return the weighted sum of the same elements of several tensors, as bytes."""
    last = torch.from_numpy(parts[-1])
    if len(parts) == 1 or not dtype.floating:
        return parts[-1]
    kind, bits = torch_dtype(dtype).to_real(), _LANES[dtype.lane]
    wide = torch.float64 if dtype.lane > 2 else torch.float32
    kept = last.view(bits)
    equal = torch.ones(kept.shape, dtype=torch.bool)
    total: torch.Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        one = torch.from_numpy(part)
        equal &= one.view(bits) == kept
        # The product is rounded by itself: a fused addition may round otherwise at a border.
        term = one.view(kind).to(wide) * weight
        total = term if total is None else total + term
    if total is None or bool(equal.all()):
        return parts[-1]
    # A conversion may give a NaN other bits in a vector than in the rest of a tensor.
    nan = torch.tensor([math.nan], dtype=kind).view(bits)
    rounded = torch.where(total.isnan(), nan, total.to(kind).view(bits))
    data: Bytes = torch.where(equal, kept, rounded).view(torch.uint8).numpy()
    return data
