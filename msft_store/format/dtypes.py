"""The element types that a store knows: one table for torch, safetensors and the byte format.

Names are torch's (``bfloat16``, ``float32``, …). Codes never change (``docs/FORMAT.md``, section
3). A type that the installed torch lacks has ``torch=None``: a store that holds it still opens, and
only loading such a tensor fails.

Example::

    dtype_by_name("bfloat16").size              # 2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msft_store.errors import InvalidInputError, VersionError


@dataclass(frozen=True, kw_only=True)
class DType:
    """An element type."""

    name: str
    code: int
    size: int
    """Bytes per element."""
    lane: int
    """Bytes of a lane, the integer that changes are computed in; half an element if complex."""
    floating: bool
    """True if lanes are sign-magnitude floats."""
    safetensors: str | None
    torch: torch.dtype | None


def _dtype(
    code: int, name: str, size: int, safetensors: str | None, *, floating: bool, parts: int = 1
) -> DType:
    return DType(
        name=name,
        code=code,
        size=size,
        lane=size // parts,
        floating=floating,
        safetensors=safetensors,
        torch=getattr(torch, name, None),
    )


DTYPES = (
    _dtype(1, "bool", 1, "BOOL", floating=False),
    _dtype(2, "uint8", 1, "U8", floating=False),
    _dtype(3, "int8", 1, "I8", floating=False),
    _dtype(4, "uint16", 2, "U16", floating=False),
    _dtype(5, "int16", 2, "I16", floating=False),
    _dtype(6, "uint32", 4, "U32", floating=False),
    _dtype(7, "int32", 4, "I32", floating=False),
    _dtype(8, "uint64", 8, "U64", floating=False),
    _dtype(9, "int64", 8, "I64", floating=False),
    _dtype(16, "float16", 2, "F16", floating=True),
    _dtype(17, "bfloat16", 2, "BF16", floating=True),
    _dtype(18, "float32", 4, "F32", floating=True),
    _dtype(19, "float64", 8, "F64", floating=True),
    _dtype(24, "float8_e4m3fn", 1, "F8_E4M3", floating=True),
    _dtype(25, "float8_e5m2", 1, "F8_E5M2", floating=True),
    _dtype(26, "float8_e4m3fnuz", 1, None, floating=True),
    _dtype(27, "float8_e5m2fnuz", 1, None, floating=True),
    _dtype(28, "float8_e8m0fnu", 1, "F8_E8M0", floating=False),
    _dtype(32, "complex32", 4, None, floating=True, parts=2),
    _dtype(33, "complex64", 8, "C64", floating=True, parts=2),
    _dtype(34, "complex128", 16, None, floating=True, parts=2),
)
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_CODE = {dtype.code: dtype for dtype in DTYPES}
_BY_TORCH = {dtype.torch: dtype for dtype in DTYPES if dtype.torch is not None}
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES if dtype.safetensors is not None}


def dtype_by_name(name: str) -> DType:
    """Return the type of a format name; :class:`VersionError` if there is none."""
    try:
        return _BY_NAME[name]
    except (KeyError, TypeError):
        raise VersionError(f"unknown dtype {name!r}; a newer msft-store may read it") from None


def dtype_by_code(code: int) -> DType:
    """Return the type of a format code; :class:`VersionError` if there is none."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise VersionError(f"unknown dtype code {code}; a newer msft-store may read it") from None


def dtype_by_torch(dtype: torch.dtype) -> DType:
    """Return the type of a torch dtype; :class:`InvalidInputError` if the store cannot keep it."""
    try:
        return _BY_TORCH[dtype]
    except KeyError:
        raise InvalidInputError(f"tensors of {dtype} cannot be stored") from None


def dtype_by_safetensors(name: str) -> DType:
    """Return the type of a safetensors name; :class:`InvalidInputError` if there is none."""
    try:
        return _BY_SAFETENSORS[name]
    except KeyError:
        raise InvalidInputError(f"safetensors dtype {name!r} is not supported") from None
