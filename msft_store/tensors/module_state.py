"""Tell the memory of a module from the copies in its state dict, and give copies back to it.

``state_dict()`` returns views of parameters and buffers, which can be restored in place, and also
values that the module makes for it: extra state, or weights that it keeps in another form. A module
takes these back only through ``load_state_dict``. Invariant: a value that is no memory of the
target is never written to.

Example::

    memory, copies = split_entries(module)
    tensors = flatten_entries(memory)               # restore these in place
    load_copies(module, {name: restored[name] for name in copies})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from msft_store.errors import MismatchError
from msft_store.tensors.bytes import flatten_entries, to_bytes
from msft_store.tensors.nested import inner_tensors, is_wrapper


def split_entries(
    target: torch.nn.Module | Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the entries of a target that can be restored in place, and the other ones.

    Raise :class:`MismatchError` if a mapping has other ones, because nothing takes them back.
    """
    if not isinstance(target, torch.nn.Module):
        for name, value in target.items():
            if not isinstance(value, torch.Tensor):
                raise MismatchError(
                    f"{name!r} is a {type(value).__name__}, which cannot be restored in place: if "
                    "it is the extra state of a module, pass the module. Nothing was changed"
                )
            if _places(value) != _places(value):
                raise MismatchError(
                    f"{name!r} is a {type(value).__name__} that gives only copies of its tensors. "
                    "Nothing was changed"
                )
        return dict(target), {}
    parameters = target.named_parameters(remove_duplicate=False)
    own = [*parameters, *target.named_buffers(remove_duplicate=False)]
    places = {place for _, tensor in own for place in _places(tensor)}
    names = {name for name, _ in own}
    memory: dict[str, torch.Tensor] = {}
    copies: dict[str, Any] = {}
    for name, value in target.state_dict().items():
        found = _places(value) if isinstance(value, torch.Tensor) else {None}
        # A tensor without memory, such as an empty one, can only be known by its name.
        is_own = found <= places if found else name in names
        (memory if is_own else copies)[name] = value
    return memory, copies


def _places(tensor: torch.Tensor) -> set[object]:
    """Return values that identify the memory of a tensor; none if it has no memory."""
    places: set[object] = set()
    for inner in inner_tensors(tensor):
        if hasattr(inner, "to_local"):
            places |= _places(inner.to_local())
        elif inner.layout == torch.strided and not inner.is_meta and not inner.is_nested:
            places.add((inner.device, inner.untyped_storage().data_ptr()) if inner.numel() else "")
    return places - {""}


def load_copies(module: torch.nn.Module, values: Mapping[str, Any]) -> None:
    """Let a module's ``load_state_dict`` restore the entries that are copies.

    The state is given complete, because a module may need several entries together. Raise
    :class:`MismatchError` if the module does not take a value back.
    """
    if not values:
        return
    # A wrapper was restored through its inner tensors; not every class of them can be copied to.
    state = {name: value for name, value in module.state_dict().items() if not is_wrapper(value)}
    try:
        result = module.load_state_dict({**state, **values}, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MismatchError(
            f"load_state_dict of the target refused {', '.join(values)}: {reason}. "
            "The other tensors are restored"
        ) from error
    ignored = sorted(values.keys() & set(result.unexpected_keys))
    lost = [name for name in ignored if not _holds(module, name, values[name])]
    for name in lost:
        # The entry may be the memory of a tensor that the module did not register.
        current = module.state_dict()[name]
        if torch.is_tensor(current) and current.shape == values[name].shape:
            current.copy_(values[name])
    lost = [name for name in lost if not _holds(module, name, values[name])]
    if lost:
        raise MismatchError(
            f"load_state_dict of the target ignores {', '.join(lost)}, which its state_dict "
            "returns as copies. The other tensors are restored"
        )


def _holds(module: torch.nn.Module, name: str, value: Any) -> bool:
    """Return True if a module's entry equals a value bit by bit."""
    have = flatten_entries({name: module.state_dict()[name]})
    want = flatten_entries({name: value})
    return have.keys() == want.keys() and all(
        (have[part].shape, have[part].dtype) == (tensor.shape, tensor.dtype)
        and bool((to_bytes(have[part]) == to_bytes(tensor)).all())
        for part, tensor in want.items()
    )
