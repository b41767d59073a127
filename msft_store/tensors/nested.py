"""Split nested state into tensors and JSON, so that a checkpoint can hold it without pickle.

The states of optimizers, schedulers and random generators are nested dictionaries and lists of
tensors, numbers and strings. :func:`flatten` names each tensor by its path and puts the rest into
JSON. Invariant: :func:`unflatten` returns equal values of equal types, including tuples, integer
keys, NaN, large integers, NumPy arrays, ``Counter`` and ``BytesIO``. Other subclasses are returned
as the builtin type that they extend. A tensor that occurs in several places is stored once for
each. A tensor subclass with ``__tensor_flatten__`` becomes its inner tensors, and is rebuilt if the
module of its class has been imported; nothing is imported, and no class but it runs any code.

Example::

    tensors, tree = flatten({"optimizer": optimizer.state_dict(), "step": 40})
    ckpt = store.save({**weights, **tensors}, metadata={"state": tree})
    state = unflatten(store.load(ckpt), ckpt.metadata["state"])
"""

from __future__ import annotations

import dataclasses
import enum
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from msft_store.errors import InvalidInputError, MismatchError
from msft_store.format.layout import canonical_json

_TENSOR, _ARRAY, _TUPLE = "$tensor", "$array", "$tuple"
_DICT, _COUNTER = "$dict", "$counter"
_FLOAT, _INTEGER, _BYTES, _STREAM = "$float", "$integer", "$bytes", "$bytesio"
_SUBCLASS, _DTYPE, _DEVICE = "$subclass", "$dtype", "$device"
_SIZE, _ENUM, _FIELDS = "$size", "$enum", "$fields"
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

    Tensors that ``tree`` does not name are ignored.

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


def to_tensors(state: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Convert nested state to tensors: those of :func:`flatten`, and its JSON as bytes.

    All names begin with ``prefix`` and a point; ``<prefix>.json`` is that of the JSON.

    Raises:
        InvalidInputError: A value is neither a tensor nor plain; the message names it.
    """
    tensors, tree = flatten(state, prefix)
    tensors[json_name(prefix)] = torch.frombuffer(
        bytearray(canonical_json(tree)), dtype=torch.uint8
    )
    return tensors


def from_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> Any:
    """Return the nested state that :func:`to_tensors` was given; ignore other tensors.

    Raises:
        MismatchError: There is no state with this prefix.
    """
    if json_name(prefix) not in tensors:
        raise MismatchError(f"the checkpoint has no state named {prefix!r}, only weights")
    return unflatten(tensors, parse_json(tensors[json_name(prefix)]))


def json_name(prefix: str) -> str:
    """Return the name of the tensor with the JSON of :func:`to_tensors`."""
    return f"{prefix}.json"


def parse_json(text: torch.Tensor) -> Any:
    """Return the JSON value that :func:`to_tensors` stored in a tensor."""
    return json.loads(text.cpu().numpy().tobytes())


def names_in(tree: Any) -> list[str]:
    """Return the names of the tensors that a JSON value of :func:`flatten` refers to."""
    if isinstance(tree, Mapping):
        kind = next(iter(tree), "")
        if len(tree) == 1 and kind in (_TENSOR, _ARRAY):
            return [str(tree[kind])]
        tree = tree.values()
    elif not isinstance(tree, list):
        return []
    return [name for item in tree for name in names_in(item)]


def is_wrapper(value: object) -> bool:
    """Return True for a tensor subclass that is made of the tensors of ``__tensor_flatten__``."""
    return (
        isinstance(value, torch.Tensor)
        and hasattr(value, "__tensor_flatten__")
        and not hasattr(value, "placements")
        and not value.is_nested
    )


def inner_tensors(value: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor is made of."""
    if not is_wrapper(value):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in inner_tensors(getattr(value, name))]


def _to_json(value: Any, name: str, tensors: dict[str, torch.Tensor], level: int) -> Any:
    if level > _MAX_LEVELS:
        raise InvalidInputError(f"{name[:80]!r} is nested more than {_MAX_LEVELS} levels deep")
    if is_wrapper(value):
        names, context = value.__tensor_flatten__()
        inner = [
            [key, _to_json(getattr(value, key), _join_path(name, key), tensors, level + 1)]
            for key in names
        ]
        return {
            _SUBCLASS: {
                "type": _type_name(type(value)),
                "inner": inner,
                "context": _context_to_json(context, name),
                "size": list(value.shape),
                "stride": list(value.stride()),
            }
        }
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


def _context_to_json(value: Any, name: str) -> Any:
    """Convert the context of a tensor subclass to JSON that gives back equal types."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {_FLOAT: value.hex()}
    if isinstance(value, (torch.dtype, torch.device)):
        kind = _DTYPE if isinstance(value, torch.dtype) else _DEVICE
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, enum.Enum):
        return {_ENUM: [_type_name(type(value)), value.name]}
    if type(value) in (list, tuple, torch.Size):
        items = [_context_to_json(item, name) for item in value]
        if type(value) is list:
            return items
        return {_TUPLE if type(value) is tuple else _SIZE: items}
    if type(value) is dict:
        return {_DICT: [[_context_to_json(part, name) for part in pair] for pair in value.items()]}
    fields: Any = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if fields is None and dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    if fields is None:
        raise InvalidInputError(
            f"{name!r} is a tensor subclass whose __tensor_flatten__ has a context with a "
            f"{type(value).__name__}, which cannot be kept: save its plain tensors instead"
        )
    parts = [[field, _context_to_json(getattr(value, field), name)] for field in fields]
    return {_FIELDS: [_type_name(type(value)), parts]}


def _context_from_json(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_context_from_json(item) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    ((kind, content),) = tree.items()
    if kind == _FLOAT:
        return float.fromhex(content)
    if kind == _DTYPE:
        return getattr(torch, content)
    if kind == _DEVICE:
        return torch.device(content)
    if kind == _ENUM:
        return _find_type(content[0], enum.Enum)[content[1]]
    if kind in (_TUPLE, _SIZE):
        items = [_context_from_json(item) for item in content]
        return tuple(items) if kind == _TUPLE else torch.Size(items)
    if kind == _DICT:
        return {_context_from_json(key): _context_from_json(item) for key, item in content}
    if kind != _FIELDS:
        raise ValueError(f"it has an unknown part {kind[:80]!r}")
    found: Any = _find_type(content[0], object)
    values = {field: _context_from_json(item) for field, item in content[1]}
    # Neither the class's __new__ nor its __init__ runs, so that stored names run no code.
    if issubclass(found, tuple):
        return tuple.__new__(found, values.values())
    new = object.__new__(found)
    if not dataclasses.is_dataclass(new):
        raise ValueError(f"{content[0]} is not a dataclass")
    for field, item in values.items():
        object.__setattr__(new, field, item)
    return new


def _type_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _find_type(name: str, parent: type) -> Any:
    """Return a class of a module that has been imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise MismatchError(f"this state has a {path}: import {module} before it is loaded")
    if not (isinstance(found, type) and issubclass(found, parent)):
        raise ValueError(f"{name} is not a {parent.__name__}")
    return found


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
    if kind == _SUBCLASS:
        inner = {key: _from_json(item, tensors) for key, item in content["inner"]}
        return _find_type(content["type"], torch.Tensor).__tensor_unflatten__(
            inner,
            _context_from_json(content["context"]),
            torch.Size(content["size"]),
            tuple(content["stride"]),
        )
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
