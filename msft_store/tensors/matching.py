"""Check that target tensors match a checkpoint exactly in names, shapes and dtypes.

Example::

    check_match(checkpoint, entries, module.state_dict())      # MismatchError names what differs
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from msft_store.errors import InvalidInputError, MismatchError
from msft_store.format.dtypes import dtype_by_torch
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.tensors.bytes import memory_key
from msft_store.tensors.names import plain_name, plain_names

_NAMES_SHOWN = 5


def check_match(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorEntry],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Raise :class:`MismatchError`, which names the differences, unless all tensors match."""
    problems = []
    missing = sorted(state.keys() - tensors.keys())
    extra = sorted(tensors.keys() - state.keys())
    if missing:
        problems.append(f"the checkpoint lacks {format_names(missing)}")
    if extra:
        problems.append(f"the target lacks {format_names(extra)}")
    for name in sorted(state.keys() & tensors.keys()):
        have, want = state[name], tensors[name]
        if tuple(have.shape) != want.shape:
            problems.append(f"{name} is {tuple(have.shape)}, in the checkpoint {want.shape}")
        elif have.is_meta:
            problems.append(f"{name} is on the meta device and has no memory")
        elif have.layout != torch.strided or have.is_quantized or have.is_nested:
            problems.append(f"{name} has no plain memory (sparse, quantized or nested)")
        elif 0 in (s for s, n in zip(have.stride(), have.shape, strict=True) if n > 1):
            problems.append(f"{name} is expanded: its elements share memory")
        elif dtype_by_torch(have.dtype) != want.dtype:
            problems.append(f"{name} is {have.dtype}, in the checkpoint {want.dtype.name}")
    problems += _compare_tied_tensors(tensors, state) if not problems else []
    if problems:
        more = f"; and {len(problems) - _NAMES_SHOWN} more" * (len(problems) > _NAMES_SHOWN)
        raise MismatchError(
            f"the target does not match checkpoint {checkpoint.id[:12]}: "
            f"{'; '.join(problems[:_NAMES_SHOWN])}{more}. Nothing was changed"
        )


def check_kinds(
    checkpoint: Checkpoint,
    stored: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Raise :class:`MismatchError` unless tensor subclasses have the stored class and context."""
    for name, text in stored.items():
        if not torch.equal(text, state[name]):
            raise MismatchError(
                f"the target does not match checkpoint {checkpoint.id[:12]}: {name} describes "
                "another tensor subclass, or another context of it. Nothing was changed"
            )


def _compare_tied_tensors(
    tensors: Mapping[str, TensorEntry], state: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    # Tied tensors share memory, so they must have the same content in the checkpoint.
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        first = seen.setdefault(memory_key(tensor), name)
        if tensor.numel() and _content(tensors[name]) != _content(tensors[first]):
            yield f"{first} and {name} share memory, but differ in the checkpoint"


def _content(entry: TensorEntry) -> list[tuple[object, ...]]:
    return [(piece.offset, piece.shape, piece.keys) for piece in entry.pieces]


def select_tensors(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], names: Iterable[str]
) -> dict[str, TensorEntry]:
    """Return the named tensors; :class:`MismatchError` if the checkpoint lacks one."""
    wanted = None if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if wanted is None or not all(isinstance(name, str) for name in wanted):
        raise InvalidInputError(
            f"names are those of tensors, such as ['lm_head.weight'], not {names!r}"
        )
    plain = plain_names(tensors)
    found = {name: tensors.get(name, plain.get(plain_name(name))) for name in wanted}
    absent = sorted(name for name, entry in found.items() if entry is None)
    if absent:
        raise MismatchError(f"checkpoint {checkpoint.id[:12]} has no {format_names(absent)}")
    return {name: entry for name, entry in found.items() if entry is not None}


def format_names(names: Sequence[str]) -> str:
    """Return the first few names as text, and the number of the others."""
    more = f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN)
    return ", ".join(names[:_NAMES_SHOWN]) + more
