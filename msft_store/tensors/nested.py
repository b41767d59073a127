"""Split nested state into tensors and JSON, so that a checkpoint can hold it without pickle.

The states of optimizers, schedulers and random generators are nested dictionaries and lists of
tensors, numbers and strings. :func:`flatten` names each tensor by its path and puts the rest into
JSON. Invariant: :func:`unflatten` returns equal values of equal types, including tuples, integer
keys, NaN, large integers, NumPy arrays, ``Counter`` and ``BytesIO``. Other subclasses are returned
as the builtin type that they extend. A tensor that occurs in several places is stored once for
each.

Example::

    tensors, tree = flatten({"optimizer": optimizer.state_dict(), "step": 40})
    ckpt = store.save({**weights, **tensors}, metadata={"state": tree})
    state = unflatten(store.load(ckpt), ckpt.metadata["state"])
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from msft_store.errors import InvalidInputError, MismatchError

_TENSOR, _ARRAY, _TUPLE = "$tensor", "$array", "$tuple"
_DICT, _COUNTER = "$dict", "$counter"
_FLOAT, _INTEGER, _BYTES, _STREAM = "$float", "$integer", "$bytes", "$bytesio"
_INTEGER_LIMIT = 1 << 63
_MAX_BITS = 14_000
"""Maximum size of an integer; Python converts at most 4,300 decimal digits."""
_MAX_LEVELS = 40
"""Maximum depth; a level can take several of the 64 levels that metadata may have."""


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Split a nested value into its tensors and a JSON value that refers to them by name.

    Args:
        tree: Tensors, NumPy arrays, numbers, strings, ``bytes``, ``BytesIO`` and ``None``, in
            mappings, lists and tuples.
        prefix: Beginning of every tensor's name.

    Returns:
        The tensors by name, and the JSON value for :func:`unflatten`.

    Raises:
        InvalidInputError: The value holds an object of another type; the message names its path.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _to_json(tree, prefix, tensors, 0)


def unflatten(tensors: Mapping[str, torch.Tensor], tree: Any) -> Any:
    """Rebuild a nested value from the results of :func:`flatten`.

    Args:
        tensors: Tensors by name; those that ``tree`` does not name are ignored.
        tree: JSON value that :func:`flatten` returned.

    Returns:
        The nested value, with the given tensors in it.

    Raises:
        MismatchError: A tensor is missing.
        InvalidInputError: ``tree`` is not a result of :func:`flatten`.
    """
    try:
        return _from_json(tree, tensors)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidInputError(
            f"this is not a nested state that flatten returned: {error}"
        ) from None


def _to_json(value: Any, name: str, tensors: dict[str, torch.Tensor], level: int) -> Any:
    if level > _MAX_LEVELS:
        raise InvalidInputError(f"{name[:80]!r} is nested more than {_MAX_LEVELS} levels deep")
    if isinstance(value, torch.Tensor):
        return {_TENSOR: _add_tensor(tensors, name, value)}
    if isinstance(value, np.ndarray) and _is_convertible(value):
        return {_ARRAY: _add_tensor(tensors, name, torch.from_numpy(np.array(value, order="C")))}
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        if value.bit_length() > _MAX_BITS:
            raise InvalidInputError(f"{name or 'the state'} is an integer with too many digits")
        return value if -_INTEGER_LIMIT <= value < _INTEGER_LIMIT else {_INTEGER: str(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if isinstance(value, io.BytesIO) and not value.closed:
        return {_STREAM: [value.getvalue().hex(), value.tell()]}
    if isinstance(value, (list, tuple)):
        items = [
            _to_json(item, _join_path(name, at), tensors, level + 1)
            for at, item in enumerate(value)
        ]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return _mapping_to_json(value, name, tensors, level)
    raise InvalidInputError(
        f"{name or 'the state'} is a {_describe_type(value)}; nested state holds tensors, numbers, "
        "strings, bytes, None, and mappings, lists and tuples of them. Convert it, or leave it out"
    )


def _mapping_to_json(
    value: Mapping[Any, Any], name: str, tensors: dict[str, torch.Tensor], level: int
) -> Any:
    for key in value:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise InvalidInputError(
                f"{name or 'the state'} has the key {key!r}, which is not a string or int"
            )
    below = {
        key: _to_json(item, _join_path(name, key), tensors, level + 1)
        for key, item in value.items()
    }
    # Canonical JSON sorts keys, but some state dicts depend on the order of their keys.
    counter = isinstance(value, Counter)
    plain = all(isinstance(key, str) and not key.startswith("$") for key in below)
    if plain and not counter and list(below) == sorted(below):
        return below
    return {_COUNTER if counter else _DICT: [[key, item] for key, item in below.items()]}


def _describe_type(value: object) -> str:
    name = type(value).__name__
    return f"{name} of {value.dtype}" if isinstance(value, np.ndarray) else name


def _is_convertible(array: np.ndarray[Any, Any]) -> bool:
    """Return True if torch has the array's type and the array has no mask."""
    native = array.dtype.isnative and array.dtype.kind in "biuf" and array.dtype.itemsize <= 8
    return native and not isinstance(array, np.ma.MaskedArray)


def _join_path(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _add_tensor(tensors: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> str:
    # Two paths can give the same name, and a lone tensor has an empty path.
    wanted = unique = name or "value"
    number = 2
    while unique in tensors:
        unique, number = f"{wanted}~{number}", number + 1
    tensors[unique] = tensor
    return unique


def _from_json(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_json(item, tensors) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    if len(tree) != 1 or not next(iter(tree)).startswith("$"):
        return {key: _from_json(item, tensors) for key, item in tree.items()}
    ((kind, content),) = tree.items()
    if kind in (_TENSOR, _ARRAY):
        if content not in tensors:
            raise MismatchError(f"the tensor {content!r} of this nested state is missing")
        found = tensors[content]
        return found if kind == _TENSOR else found.detach().cpu().numpy()
    if kind == _TUPLE:
        return tuple(_from_json(item, tensors) for item in content)
    if kind in (_DICT, _COUNTER):
        below = {key: _from_json(item, tensors) for key, item in content}
        return Counter(below) if kind == _COUNTER else below
    if kind == _BYTES:
        return bytes.fromhex(content)
    if kind == _STREAM:
        text, position = content
        stream = io.BytesIO(bytes.fromhex(text))
        stream.seek(position)
        return stream
    if kind == _FLOAT:
        return float(content)
    if kind == _INTEGER:
        return int(content)
    raise ValueError(f"it has an unknown part {kind[:80]!r}")
