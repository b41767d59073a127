"""Between torch tensors and the bytes of pieces.

Invariant: bits go through unchanged. A tensor of any layout becomes its row-major little-endian
bytes, and back.

Example::

    data = to_bytes(tensor)                       # a view where the tensor allows it
    out = torch.empty(shape, dtype=torch.bfloat16)
    view_bytes(out)[:] = data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from msft_store.dtypes import DType, by_torch
from msft_store.errors import InvalidInputError, VersionError
from msft_store.kernels import Bytes

_MAX_NAME = 4096


def check_tensors(tensors: Any) -> dict[str, torch.Tensor]:
    """Return what can be saved; :class:`InvalidInputError` names the first thing that cannot."""
    if isinstance(tensors, torch.nn.Module):
        tensors = tensors.state_dict()
    if not isinstance(tensors, Mapping):
        raise InvalidInputError(
            f"save takes a mapping from names to tensors, or a module, not {type(tensors).__name__}"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or len(name) > _MAX_NAME or "\0" in name:
            raise InvalidInputError(f"{str(name)[:80]!r} cannot be the name of a tensor")
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise InvalidInputError(f"{name!r} has no plain memory (sparse, meta or nested)")
        if tensor.is_quantized:
            raise InvalidInputError(f"{name!r} is quantized; save its integers and scales")
        if hasattr(tensor, "placements"):
            raise InvalidInputError(f"{name!r} is sharded (DTensor); gather it before saving")
        by_torch(tensor.dtype)
    return dict(tensors)


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what is equal for tied tensors only: the place and its interpretation."""
    place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
    return (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())


def to_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a tensor's row-major bytes; they share memory with a contiguous CPU tensor."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data: Bytes = plain.reshape(-1).view(torch.uint8).numpy()
    return data


def view_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a writable view of a contiguous CPU tensor's bytes."""
    data: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return data


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype; :class:`VersionError` if this torch has none."""
    if dtype.torch is None:
        raise VersionError(f"torch {torch.__version__} has no dtype {dtype.name}; use a newer one")
    return dtype.torch
