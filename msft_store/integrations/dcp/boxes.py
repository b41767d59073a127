"""Convert the tensors that a rank holds to boxes: sharded and plain tensors, items of DCP's plans.

Example::

    store.encode(boxes_of(model.state_dict()), parent=base)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from msft_store.errors import InvalidInputError
from msft_store.tensors.boxes import Box, whole_box
from msft_store.tensors.bytes import memory_key


def boxes_of(state: Mapping[str, torch.Tensor]) -> list[Box]:
    """Return the tensors that this process holds of a flat state dict, as boxes for a store.

    Use it with :meth:`Store.encode` and :meth:`Store.load_boxes` to save and restore without DCP.
    The boxes share memory with the state. Of a DTensor or a ShardedTensor, each local shard becomes
    a box with its offset and the full shape; of a replicated DTensor and of a plain tensor, every
    process has the whole.

    Raises:
        InvalidInputError: If a DTensor has partial placements, so that each rank holds a term
            of a sum.
    """
    return [box for name, tensor in state.items() for box in _shards(name, tensor)]


def _shards(name: str, tensor: torch.Tensor) -> Iterable[Box]:
    if isinstance(tensor, ShardedTensor):
        shape = tuple(tensor.metadata().size)
        return [
            Box(
                name=name,
                shape=shape,
                offset=tuple(shard.metadata.shard_offsets),
                tensor=shard.tensor.detach(),
            )
            for shard in tensor.local_shards()
        ]
    if not isinstance(tensor, DTensor):
        return [whole_box(name, tensor.detach())]
    if tensor.device_mesh.get_coordinate() is None:
        return []
    check_not_partial(name, tensor)
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = tensor.to_local().detach()
    return [Box(name=name, shape=tuple(tensor.shape), offset=tuple(offset), tensor=local)]


def make_box(item: WriteItem, tensor: Any) -> Box:
    data = item.tensor_data
    if data is None:
        raise InvalidInputError(f"{item.index.fqn} has no size; is this plan DCP's?")
    offset, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    return Box(
        name=item.index.fqn,
        shape=tuple(data.size),
        offset=offset,
        tensor=tensor.detach().reshape(sizes),
    )


def find_tied_boxes(boxes: Sequence[Box], planner: SavePlanner) -> list[Box]:
    """Return the boxes again, under the other names that their tensors have in this rank.

    DCP distributes the names of tied tensors over the ranks. The base may have the tensor under one
    of the other names only, and it is found as a reference under that name.
    """
    state = getattr(planner, "state_dict", None)
    if not isinstance(state, Mapping):
        return []
    names: dict[tuple[object, ...], list[str]] = {}
    for name, value in state.items():
        for local in _local_tensors(value):
            names.setdefault(memory_key(local), []).append(name)
    own = {box.name for box in boxes}
    return [
        replace(box, name=name)
        for box in boxes
        if box.tensor.numel()
        for name in names.get(memory_key(box.tensor), ())
        if name not in own
    ]


def _local_tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors that this rank holds of a value of a state dict."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if isinstance(local, ShardedTensor):
        return [shard.tensor for shard in local.local_shards()]
    if isinstance(local, LocalShardsWrapper):
        return local.local_shards()
    return [local] if isinstance(local, torch.Tensor) else []


def count_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def check_not_partial(name: str, value: object) -> None:
    """Raise :class:`InvalidInputError` for a DTensor of which each rank holds a term of a sum."""
    if isinstance(value, DTensor) and any(place.is_partial() for place in value.placements):
        raise InvalidInputError(
            f"{name} is a DTensor with partial placements, {value.placements}: redistribute it to "
            "Shard or Replicate first"
        )
