"""Planners for ``torch.distributed.checkpoint`` that write JSON where DCP's planners pickle.

Example::

    dcp.save(state, storage_writer=writer, planner=SavePlanner())
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
    WriteItemType,
)

from msft_store.errors import InvalidInputError, MismatchError
from msft_store.format.layout import canonical_json
from msft_store.integrations.dcp.boxes import check_not_partial
from msft_store.tensors.names import plain_name
from msft_store.tensors.nested import flatten, unflatten

OBJECTS = "dcp.json"
"""Name of the uint8 tensor with the values that are not tensors, as JSON by name."""

PATHS = "$paths"
"""Name in ``dcp.json`` of the places that the tensors and values had in the nested state."""


class SavePlanner(DefaultSavePlanner):
    """DCP's default planner for saving, with JSON in the place of pickle.

    Pass it to ``dcp.save`` or ``dcp.async_save``. Arguments are those of ``DefaultSavePlanner``.

    Raises:
        InvalidInputError: When a save begins, if a value cannot be kept as JSON, or a DTensor has
            partial placements. The message names it. Nothing was written.
    """

    def create_local_plan(self) -> SavePlan:
        """Return the plan of this rank."""
        for name, value in self.state_dict.items():
            check_not_partial(name, value)
        self._json = {
            name: _to_json(name, value)
            for name, value in self.state_dict.items()
            if not isinstance(value, (torch.Tensor, ShardedTensor))
        }
        for name in {OBJECTS, PATHS} & self.state_dict.keys():
            raise InvalidInputError(f"the name {name!r} is the store's own; use another one")
        plan: SavePlan = super().create_local_plan()
        return plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the final plan of this rank."""
        plan: SavePlan = super().finish_plan(new_plan)
        # A plan that DCP cached at the first save holds the task of that save.
        return replace(plan, storage_data=new_plan.storage_data)

    def json_of(self, write_item: WriteItem) -> bytes:
        """Return the JSON of a value that is not a tensor."""
        return self._json[write_item.index.fqn]

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return the tensor, or the JSON of another value."""
        is_tensor = write_item.type != WriteItemType.BYTE_IO
        return object if is_tensor else io.BytesIO(self.json_of(write_item))


class LoadPlanner(DefaultLoadPlanner):
    """DCP's default planner for loading, with JSON in the place of pickle.

    Pass it to ``dcp.load``. Arguments are those of ``DefaultLoadPlanner``. Values below keys that
    are no strings, as in the state of an optimizer, are restored under these keys. DCP's planner
    adds them under the key as a string.

    Raises:
        MismatchError: When a load begins, if a tensor has another dtype. Nothing was changed in any
            rank.
        InvalidInputError: When a load begins, if a DTensor has partial placements.
    """

    def create_local_plan(self) -> LoadPlan:
        """Return the plan of this rank."""
        plan: LoadPlan = super().create_local_plan()
        saved = self.metadata.state_dict_metadata if self.metadata else {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                continue
            name = item.dest_index.fqn
            check_not_partial(name, self.state_dict[name])
            dtype = self.resolve_tensor(item).dtype
            entry = saved[item.storage_index.fqn]
            if isinstance(entry, TensorStorageMetadata) and dtype != entry.properties.dtype:
                raise MismatchError(
                    f"{name} is of {dtype}, in the checkpoint of {entry.properties.dtype}. "
                    "Nothing was changed"
                )
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Restore a value that is not a tensor."""
        name = read_item.dest_index.fqn
        place: Any = self.original_state_dict
        *path, last = self.mappings[name] if self.flatten_state_dict else (name,)
        for key in path:
            place = place[_find_key(place, key)]
        place[_find_key(place, last)] = unflatten({}, json.loads(value.getvalue()))


def _find_key(place: Any, key: Any) -> Any:
    """Return the key that DCP turned into a string: 0 for ``"0"``."""
    if isinstance(place, Mapping) and key not in place:
        if key.isdecimal() and int(key) in place:
            return int(key)
        return next((other for other in place if str(other) == key), key)
    return key


def group_paths(paths: object) -> list[Any]:
    """Group the paths that DCP gives the names of a nested state by their containers, for JSON.

    Paths of one key are left out. Names and paths become plain.
    """
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for name, given in paths.items() if isinstance(paths, Mapping) else ():
        path = [plain_name(key) if isinstance(key, str) else key for key in given]
        if len(path) > 1 and plain_name(name) == _name_of(path):
            groups.setdefault(tuple(path[:-1]), []).append(path[-1])
    return [[list(container), keys] for container, keys in groups.items()]


def paths_by_name(groups: list[Any]) -> dict[str, tuple[Any, ...]]:
    """Return the paths that :func:`group_paths` grouped."""
    paths = [(*container, key) for container, keys in groups for key in keys]
    return {_name_of(path): path for path in paths}


def find_roots(groups: list[Any]) -> set[str]:
    """Return the prefixes of the dictionaries in a flattened state: ``model.``, …."""
    containers = [container for container, _ in groups]
    return {
        f"{_name_of(container[:depth])}."
        for container in containers
        for depth in range(1, len(container) + 1)
    }


def _name_of(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def check_can_write(name: str, planner: object) -> SavePlanner:
    """Return the planner, or raise an error because it would pickle a value."""
    if not isinstance(planner, SavePlanner):
        raise InvalidInputError(
            f"{name} is not a tensor, and DCP's own planner pickles it: pass "
            "planner=SavePlanner() of msft_store.integrations.dcp, which writes JSON"
        )
    return planner


def check_caching(planner: object) -> None:
    """Raise an error for a planner of DCP that caches the plan of the first save."""
    keeps = getattr(planner, "_enable_plan_caching", False)
    if keeps and not isinstance(planner, SavePlanner):
        raise InvalidInputError(
            "DCP's own planner caches the parent of its first save with the plan: pass "
            "planner=SavePlanner(enable_plan_caching=True) of msft_store.integrations.dcp"
        )


def _to_json(name: str, value: Any) -> bytes:
    tensors, tree = flatten(value, name)
    if tensors:
        raise InvalidInputError(
            f"{name} is a {type(value).__name__} with tensors or arrays in it, which DCP does not "
            "split: use a list in the place of a tuple, and tensors in the place of arrays"
        )
    return canonical_json(tree)
