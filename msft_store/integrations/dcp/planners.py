"""Planners for ``torch.distributed.checkpoint`` that keep JSON where its own pickle.

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
from msft_store.integrations.dcp.boxes import check_whole
from msft_store.tensors.nested import flatten, unflatten

OBJECTS = "dcp.json"
"""The tensor of bytes with the values that are none, as JSON by name."""


class SavePlanner(DefaultSavePlanner):
    """DCP's own, with JSON in the place of pickles.

    :class:`InvalidInputError` names a value that JSON has no word for, before anything is written.
    """

    def create_local_plan(self) -> SavePlan:
        """Return what this rank would write."""
        for name, value in self.state_dict.items():
            check_whole(name, value)
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
        """Return what this rank is to write."""
        plan: SavePlan = super().finish_plan(new_plan)
        # A plan that DCP kept from the first save has what was said then.
        return replace(plan, storage_data=new_plan.storage_data)

    def json_of(self, write_item: WriteItem) -> bytes:
        """Return the JSON of a value that is no tensor."""
        return self._json[write_item.index.fqn]

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return what is written of a value."""
        is_tensor = write_item.type != WriteItemType.BYTE_IO
        return object if is_tensor else io.BytesIO(self.json_of(write_item))


class LoadPlanner(DefaultLoadPlanner):
    """DCP's own, with JSON in the place of pickles."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value that is no tensor into its place."""
        name = read_item.dest_index.fqn
        found = unflatten({}, json.loads(value.getvalue()))
        if not self.flatten_state_dict:
            self.original_state_dict[name] = found
            return
        *way, last = self.mappings[name]
        place: Any = self.original_state_dict
        for key in way:
            place = place[key]
        try:
            place[last] = found
        except TypeError:
            raise MismatchError(f"{name} stands in a {type(place).__name__}, not a list") from None


def roots_of(planner: object) -> frozenset[str]:
    """Return what the names of each dictionary in a flattened state begin with: ``model.``, …."""
    ways = getattr(planner, "mappings", {}).values()
    return frozenset(
        "".join(f"{key}." for key in way[:depth]) for way in ways for depth in range(1, len(way))
    )


def pickling(name: str, planner: str) -> InvalidInputError:
    """Return the error for a value that DCP's own planner would pickle."""
    return InvalidInputError(
        f"{name} is no tensor, and DCP's own planner pickles it: pass planner={planner}() of "
        "msft_store.integrations.dcp.storage, which keeps JSON"
    )


def check_caching(planner: object) -> None:
    """Raise :class:`InvalidInputError` for a planner that keeps what the first save was told."""
    keeps = getattr(planner, "_enable_plan_caching", False)
    if keeps and not isinstance(planner, SavePlanner):
        raise InvalidInputError(
            "DCP's own planner keeps the parent of its first save with the plan: pass "
            "planner=SavePlanner(enable_plan_caching=True) of msft_store.integrations.dcp"
        )


def _to_json(name: str, value: Any) -> bytes:
    tensors, tree = flatten(value, name)
    if tensors:
        raise InvalidInputError(
            f"{name} holds arrays inside of a value that DCP keeps whole; make them tensors, in a "
            "dictionary or a list"
        )
    return canonical_json(tree)
