"""Convert between torch tensors of any layout and their row-major little-endian bytes.

Invariant: conversion never changes a bit.

Example::

    data = to_bytes(tensor)                       # a view if the tensor is contiguous on the CPU
    out = torch.empty(shape, dtype=torch.bfloat16)
    view_bytes(out)[:] = data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from msft_store.codec.kernels import Bytes
from msft_store.errors import InvalidInputError, VersionError
from msft_store.format.dtypes import DType, dtype_by_torch
from msft_store.format.strict_json import MAX_DIMENSIONS, MAX_NAME
from msft_store.tensors.files import PREFIX
from msft_store.tensors.names import plain_names
from msft_store.tensors.nested import is_wrapper, to_tensors


def check_tensors(tensors: Any) -> dict[str, torch.Tensor]:
    """Return plain tensors by name; :class:`InvalidInputError` names one that cannot be saved.

    An entry of a module's state that is not a tensor, and a tensor subclass, become plain tensors.
    """
    if isinstance(tensors, torch.nn.Module):
        return check_plain(flatten_entries(plain_names(tensors.state_dict())))
    if not isinstance(tensors, Mapping):
        raise InvalidInputError(
            f"save takes a mapping from names to tensors, or a module, not {type(tensors).__name__}"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise InvalidInputError(f"{str(name)[:80]!r} cannot be the name of a tensor")
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(
                f"{name!r} is a {type(tensor).__name__}, not a tensor; if it is the extra state of "
                "a module, save the module itself"
            )
    return check_plain(flatten_entries(plain_names(tensors)))


def flatten_entries(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a state dict with plain tensors only.

    A tensor subclass, or a value that is not a tensor, becomes the tensors of :func:`to_tensors`.
    """
    flat: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not is_wrapper(value):
            flat[name] = value
            continue
        parts = to_tensors(value, name)
        for taken in parts.keys() & (flat.keys() | state.keys() - {name}):
            raise InvalidInputError(f"{taken!r} is also the name of a part of {name!r}")
        flat |= parts
    return flat


def check_plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors; :class:`InvalidInputError` names one that has no plain memory."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or len(name) > MAX_NAME or "\0" in name:
            raise InvalidInputError(f"{str(name)[:80]!r} cannot be the name of a tensor")
        if name.startswith(PREFIX):
            raise InvalidInputError(
                f"{name[:80]!r} cannot be the name of a tensor: {PREFIX} is for the files of a "
                "model; give those as files=…"
            )
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        if hasattr(tensor, "placements"):
            raise InvalidInputError(f"{name!r} is sharded (DTensor); gather it before saving")
        if tensor.is_meta:
            raise InvalidInputError(
                f"{name!r} has no plain memory (meta): if it is offloaded "
                "(device_map, cpu_offload), load the model without offloading"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            raise InvalidInputError(f"{name!r} has no plain memory (sparse or nested)")
        if tensor.is_quantized:
            raise InvalidInputError(f"{name!r} is quantized; save its integers and scales")
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise InvalidInputError(
                f"{name!r} is a {type(tensor).__name__}, a tensor subclass of which only "
                "__tensor_flatten__ could tell its content; save its plain tensors instead"
            )
        if tensor.dim() > MAX_DIMENSIONS:
            raise InvalidInputError(f"{name!r} has more than {MAX_DIMENSIONS} dimensions")
        dtype_by_torch(tensor.dtype)
    return dict(tensors)


def memory_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a value that is equal only for tied tensors: same memory, same interpretation."""
    place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
    return (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())


def may_overlap_itself(tensor: torch.Tensor) -> bool:
    """Return True if elements of a tensor may share memory; unusual strides count as sharing."""
    reach = 0
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, count in sorted(pair for pair in sizes if pair[1] > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (count - 1)
    return False


def to_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a tensor's row-major bytes; they share memory with a contiguous CPU tensor."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data: Bytes = plain.reshape(-1).view(torch.uint8).numpy()
    return data


def read_elements(tensor: torch.Tensor, start: int, stop: int) -> Bytes:
    """Return the bytes of a range of elements in row-major order, as a view if possible.

    If a view is not possible, at most about three times as many elements are copied.
    """
    return to_bytes(_read_range(tensor.detach(), start, stop))


def write_elements(tensor: torch.Tensor, start: int, data: Bytes) -> None:
    """Set a range of elements in row-major order, in a tensor of any layout and device."""
    _write_range(tensor.detach(), start, torch.from_numpy(data).view(tensor.dtype))


def has_plain_bytes(tensor: torch.Tensor) -> bool:
    """Return True if a tensor's memory is its row-major bytes, as :func:`view_bytes` needs."""
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not lazy


def view_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a writable view of a contiguous CPU tensor's bytes."""
    data: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return data


def _read_range(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor.reshape(-1)[start:stop]
    row = tensor.numel() // tensor.shape[0]
    first, last = start // row, -(-stop // row)
    if row <= stop - start:
        return tensor[first:last].reshape(-1)[start - first * row : stop - first * row]
    parts = [
        _read_range(tensor[at], max(start - at * row, 0), min(stop - at * row, row))
        for at in range(first, last)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _write_range(tensor: torch.Tensor, start: int, values: torch.Tensor) -> None:
    if tensor.is_contiguous():
        tensor.reshape(-1)[start : start + values.numel()].copy_(values)
        return
    row = tensor.numel() // tensor.shape[0]
    while values.numel():
        at, within = divmod(start, row)
        rows = values.numel() // row if within == 0 else 0
        if rows:
            count = rows * row
            tensor[at : at + rows].copy_(values[:count].reshape(rows, *tensor.shape[1:]))
        else:
            count = min(row - within, values.numel())
            _write_range(tensor[at], within, values[:count])
        start, values = start + count, values[count:]


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return the dtype of torch; :class:`VersionError` if this release of torch lacks it."""
    if dtype.torch is None:
        raise VersionError(f"torch {torch.__version__} has no dtype {dtype.name}; use a newer one")
    return dtype.torch
