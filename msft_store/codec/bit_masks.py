"""Instructions that Numba does not offer: compare many elements at once, count and find bits.

They are functions for compiled kernels only. LLVM maps them to the vector instructions of any
processor. Nothing here checks bounds.

Example::

    differ = mask_different(one, other, start)      # bit i: one[start + i] != other[start + i]
    small = mask_most(array, start, mask, most)     # bit i: array[start + i] & mask <= most
    while small != 0:
        first = count_trailing_zeros(small)
        small &= small - uint64(1)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WORD = 64
"""Elements that one mask describes."""


def _mask_different(typing: Any, one: Any, other: Any, start: Any) -> Any:
    """Return the mask of the elements from ``start`` on that differ between two arrays."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *pair, at = arguments
        values = [
            _load(context, builder, array, lanes, at)
            for array, lanes in zip((one, other), pair, strict=True)
        ]
        return builder.bitcast(builder.icmp_unsigned("!=", *values), ir.IntType(WORD))

    return types.uint64(one, other, types.uint64), generate


def _load(context: Any, builder: Any, array: Any, lanes: Any, at: Any) -> Any:
    """Return the elements of an array from ``at`` on as a vector."""
    vector = ir.VectorType(context.get_data_type(array.dtype), WORD)
    data = context.make_array(array)(context, builder, lanes).data
    place = builder.bitcast(builder.gep(data, [at]), vector.as_pointer())
    return builder.load(place, align=array.dtype.bitwidth // 8)


def _mask_most(typing: Any, array: Any, start: Any, mask: Any, most: Any) -> Any:
    """Return the mask of the elements from ``start`` on whose masked value is at most ``most``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, at, *limits = arguments
        values = _load(context, builder, array, lanes, at)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
        nothing, first = ir.Constant(values.type, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        every_mask, every_most = (
            builder.shuffle_vector(builder.insert_element(nothing, limit, first), nothing, zeros)
            for limit in limits
        )
        small = builder.icmp_unsigned("<=", builder.and_(values, every_mask), every_most)
        return builder.bitcast(small, ir.IntType(WORD))

    return types.uint64(array, types.uint64, array.dtype, array.dtype), generate


def _count_trailing_zeros(typing: Any, word: Any) -> Any:
    """Return the number of the lowest bit that is set; 64 if none is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


def _count_ones(typing: Any, word: Any) -> Any:
    """Return the number of bits that are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


mask_different: Any = intrinsic(_mask_different)
mask_most: Any = intrinsic(_mask_most)
count_trailing_zeros: Any = intrinsic(_count_trailing_zeros)
count_ones: Any = intrinsic(_count_ones)
