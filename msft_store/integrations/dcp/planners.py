"""Planners for ``torch.distributed.checkpoint`` that write JSON where DCP's planners pickle.

Example::

    dcp.save(state, storage_writer=writer, planner=SavePlanner())
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType

from msft_store.errors import InvalidInputError, MismatchError
from msft_store.format.layout import canonical_json
from msft_store.integrations.dcp.boxes import check_not_partial
from msft_store.tensors.nested import flatten, unflatten

OBJECTS = "dcp.json"
"""Name of the uint8 tensor with the values that are not tensors, as JSON by name."""


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
        if OBJECTS in self.state_dict:
            raise InvalidInputError(f"the name {OBJECTS!r} is the store's own; use another one")
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

    Pass it to ``dcp.load``. Arguments are those of ``DefaultLoadPlanner``.

    Raises:
        MismatchError: During a load, if a saved value cannot be put into the target's container.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Restore a value that is not a tensor."""
        name = read_item.dest_index.fqn
        found = unflatten({}, json.loads(value.getvalue()))
        if not self.flatten_state_dict:
            self.original_state_dict[name] = found
            return
        *path, last = self.mappings[name]
        place: Any = self.original_state_dict
        for key in path:
            place = place[key]
        try:
            place[last] = found
        except TypeError:
            raise MismatchError(f"{name} is in a {type(place).__name__}, not a list") from None


def find_roots(planner: object) -> frozenset[str]:
    """Return the prefixes of the dictionaries in a flattened state: ``model.``, …."""
    paths = getattr(planner, "mappings", {}).values()
    return frozenset(
        "".join(f"{key}." for key in path[:depth])
        for path in paths
        for depth in range(1, len(path))
    )


def pickle_error(name: str, planner: str) -> InvalidInputError:
    """Return the error for a value that DCP's own planner would pickle."""
    return InvalidInputError(
        f"{name} is not a tensor, and DCP's own planner pickles it: pass planner={planner}() of "
        "msft_store.integrations.dcp, which writes JSON"
    )


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
