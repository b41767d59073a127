"""The scenarios of PyTorch's own tests of DCP, with DCP's storage and with a store.

All scenarios of a number of ranks run in one group of processes for each storage. A scenario that a
store refuses has the reason in ``REFUSED``.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import (
    ChunkShardingSpec,
    EnumerableShardingSpec,
    ShardMetadata,
)
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,
    _load_state_dict_from_keys,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.two_tensor import TwoTensor

from msft_store import flatten
from msft_store.integrations.dcp import LoadPlanner, SavePlanner, StorageReader, StorageWriter
from tests.support.ranks import in_ranks


@dataclass(frozen=True)
class Storage:
    """DCP's own storage in files, or a store, under the same methods."""

    path: Path
    is_store: bool

    def writer(self, name: str = "a") -> Any:
        if self.is_store:
            return StorageWriter(self.path, name=name)
        return dcp.FileSystemWriter(self.path / name)

    def reader(self, name: str = "a") -> Any:
        if self.is_store:
            return StorageReader(self.path, name=name)
        return dcp.FileSystemReader(self.path / name)

    def save(self, state: Any, name: str = "a", **options: Any) -> Any:
        options.setdefault("planner", SavePlanner() if self.is_store else dcp.DefaultSavePlanner())
        return dcp.save(state, storage_writer=self.writer(name), **options)

    def load(self, state: Any, name: str = "a", **options: Any) -> Any:
        options.setdefault("planner", LoadPlanner() if self.is_store else dcp.DefaultLoadPlanner())
        dcp.load(state, storage_reader=self.reader(name), **options)
        return state


Scenario = Callable[[Storage], None]
ONE: dict[str, Scenario] = {}
FOUR: dict[str, Scenario] = {}


def one(scenario: Scenario) -> Scenario:
    ONE[scenario.__name__] = scenario
    return scenario


def four(scenario: Scenario) -> Scenario:
    FOUR[scenario.__name__] = scenario
    return scenario


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 5))


def trained(optimizer: Any, seed: int = 0, **options: Any) -> tuple[torch.nn.Module, Any]:
    module = model(seed)
    updates = optimizer(module.parameters(), **options)
    torch.manual_seed(seed)
    data = torch.randn(3, 6)

    def loss() -> torch.Tensor:
        updates.zero_grad()
        value = module(data).square().sum()
        value.backward()
        return value

    updates.step(loss)
    return module, updates


class Blob:
    """An object with a state, as DCP's ``Stateful`` describes it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"blob": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["blob"]


def comes_back(storage: Storage, state: Any, target: Any) -> None:
    storage.save(state)
    same(storage.load(target), state)


@one
def weights(storage: Storage) -> None:
    comes_back(storage, model().state_dict(), model(1).state_dict())


@one
def modules_as_objects(storage: Storage) -> None:
    storage.save({"model": model()})
    target = storage.load({"model": model(1)})
    same(target["model"].state_dict(), model().state_dict())


@one
def weights_and_bytes(storage: Storage) -> None:
    storage.save({**model().state_dict(), "blob": Blob(b"bytes")})
    assert storage.load({"blob": Blob(b"")})["blob"].value == b"bytes"


@one
def a_bytes_io(storage: Storage) -> None:
    storage.save({"blob": Blob(io.BytesIO(b"bytes"))})
    found = storage.load({"blob": Blob(io.BytesIO())})["blob"].value
    assert found.getvalue() == b"bytes"


@one
def lists_and_strings(storage: Storage) -> None:
    storage.save({"list": [1], "text": "text", "none": None, "tuple": (1, "a")})
    found = storage.load({"list": [2], "text": "other", "none": 1, "tuple": ()})
    assert found == {"list": [1], "text": "text", "none": None, "tuple": (1, "a")}


@one
def numbers_that_json_lacks(storage: Storage) -> None:
    storage.save({"a": float("nan"), "b": float("inf"), "c": 1 << 80, "d": {1: "x"}})
    assert str(storage.load({"a": 0, "b": 0, "c": 0})) == f"{{'a': nan, 'b': inf, 'c': {1 << 80}}}"


def optimizers(storage: Storage, kind: Any, **options: Any) -> None:
    before, after = trained(kind, **options), trained(kind, 1, **options)
    storage.save({"model": before[0], "optimizer": before[1]})
    storage.load({"model": after[0], "optimizer": after[1]})
    same(after[0].state_dict(), before[0].state_dict())
    tensors = {0: "exp_avg"} if kind is torch.optim.AdamW else {0: "momentum_buffer"}
    for key, name in tensors.items():
        same(after[1].state_dict()["state"][key][name], before[1].state_dict()["state"][key][name])


@one
def adamw(storage: Storage) -> None:
    optimizers(storage, torch.optim.AdamW)


@one
def sgd_with_momentum(storage: Storage) -> None:
    optimizers(storage, torch.optim.SGD, lr=0.1, momentum=0.9)


@one
def lbfgs(storage: Storage) -> None:
    storage.save({"o": trained(torch.optim.LBFGS)[1].state_dict()})
    target = trained(torch.optim.LBFGS, 1)[1].state_dict()
    target["state"][0]["n_iter"] = 99
    storage.load({"o": target})
    if storage.is_store:  # DCP's storage puts the number under the key "0".
        assert target["state"][0]["n_iter"] != 99


@one
def state_dicts_of_dcp(storage: Storage) -> None:
    module, updates = trained(torch.optim.AdamW)
    weights, moments = get_state_dict(module, updates)
    other, others = get_state_dict(*trained(torch.optim.AdamW, 1))
    storage.save({"m": weights, "o": moments})
    tensors, rest = flatten(storage.load({"m": other, "o": others}))
    expected, expected_rest = flatten({"m": weights, "o": moments})
    same(tensors, expected)
    assert rest == expected_rest


@one
def nested_mappings(storage: Storage) -> None:
    state = {"a": {"b": {"c": torch.ones(2), "d": 4}}, "a2": OrderedDict(x=torch.ones(1))}
    target = {"a": {"b": {"c": torch.zeros(2), "d": 0}}, "a2": OrderedDict(x=torch.zeros(1))}
    comes_back(storage, state, target)


@one
def lists_of_tensors(storage: Storage) -> None:
    state = {"a": [torch.ones(2), {"b": torch.ones(1)}, 3, [torch.ones(1)]]}
    target = {"a": [torch.zeros(2), {"b": torch.zeros(1)}, 0, [torch.zeros(1)]]}
    comes_back(storage, state, target)


@one
def a_state_that_is_not_flattened(storage: Storage) -> None:
    save, load = (
        (SavePlanner, LoadPlanner)
        if storage.is_store
        else (dcp.DefaultSavePlanner, dcp.DefaultLoadPlanner)
    )
    storage.save({"w": torch.ones(2), "r": {"x": 1}}, planner=save(flatten_state_dict=False))
    target = {"w": torch.zeros(2), "r": None}
    storage.load(target, planner=load(flatten_state_dict=False))
    same(target, {"w": torch.ones(2), "r": {"x": 1}})


@one
def a_checkpoint_named_as_in_torch_2_3(storage: Storage) -> None:
    _version._derived_version = "2_3"
    try:
        storage.save({"w": {"a": torch.ones(2)}, "rest": {"x": 1, "y": {"z": 2}}})
    finally:
        _version._derived_version = None
    target = {"w": {"a": torch.zeros(2)}, "rest": {"x": 0, "y": {"z": 0}}}
    same(storage.load(target)["rest"], {"x": 1, "y": {"z": 2}})


@one
def scalars_and_empty_tensors(storage: Storage) -> None:
    state = {"a": torch.tensor(3.0), "b": torch.ones(0, 3), "c": torch.ones(2, 0)}
    comes_back(storage, state, {key: torch.zeros_like(value) for key, value in state.items()})


@one
def dtypes(storage: Storage) -> None:
    names = "bfloat16 float16 float64 int8 uint8 int16 int32 int64 bool float8_e4m3fn"
    state = {name: torch.ones(3).to(getattr(torch, name)) for name in names.split()}
    target = {name: torch.zeros(3).to(value.dtype) for name, value in state.items()}
    storage.save(state)
    storage.load(target)
    for name, value in state.items():
        assert torch.equal(target[name].view(torch.uint8), value.view(torch.uint8)), name


@one
def views_and_tied_tensors(storage: Storage) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    state = {"t": tensor.t(), "s": tensor[:, ::2], "a": tensor, "b": tensor}
    comes_back(storage, state, {name: torch.zeros_like(value) for name, value in state.items()})


@one
def parameters_that_require_gradients(storage: Storage) -> None:
    storage.save(model().state_dict(keep_vars=True))
    target = model(1)
    storage.load(target.state_dict(keep_vars=True))
    same(target.state_dict(), model().state_dict())


@one
def a_part_of_the_checkpoint(storage: Storage) -> None:
    storage.save({"a": torch.ones(2), "b": torch.ones(3), "k": 1})
    same(storage.load({"b": torch.zeros(3)}), {"b": torch.ones(3)})


@one
def a_target_with_more_than_the_checkpoint(storage: Storage) -> None:
    storage.save({"a": torch.ones(2)})
    with pytest.raises(dcp.CheckpointException, match="Missing key"):
        storage.load({"a": torch.zeros(2), "b": torch.zeros(3)})
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    target = storage.load({"a": torch.zeros(2), "b": torch.zeros(3)}, planner=planner)
    same(target, {"a": torch.ones(2), "b": torch.zeros(3)})


@one
def a_target_of_another_shape(storage: Storage) -> None:
    storage.save({"a": torch.ones(2)})
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        storage.load({"a": torch.zeros(3)})


@one
def a_target_of_another_dtype(storage: Storage) -> None:
    storage.save({"a": torch.ones(2)})
    same(storage.load({"a": torch.zeros(2).half()}), {"a": torch.ones(2).half()})


@one
def a_second_save_under_the_same_name(storage: Storage) -> None:
    storage.save({"a": torch.ones(2)})
    comes_back(storage, {"a": torch.ones(3)}, {"a": torch.zeros(3)})


@one
def several_checkpoints(storage: Storage) -> None:
    for step in range(3):
        storage.save({"a": torch.full((2,), float(step))}, f"step-{step}")
    same(storage.load({"a": torch.zeros(2)}, "step-1"), {"a": torch.ones(2)})


@one
def a_save_in_the_background(storage: Storage) -> None:
    planner = SavePlanner() if storage.is_store else dcp.DefaultSavePlanner()
    state = {"a": torch.ones(2), "k": 1}
    done: Any = dcp.async_save(state, storage_writer=storage.writer(), planner=planner)
    state["a"] += 1
    done.result()
    same(storage.load({"a": torch.zeros(2), "k": 0}), {"a": torch.ones(2), "k": 1})


@one
def a_save_in_another_process(storage: Storage) -> None:
    planner = SavePlanner() if storage.is_store else dcp.DefaultSavePlanner()
    state, process = {"a": torch.ones(2), "k": 1}, AsyncCheckpointerType.PROCESS
    done: Any = dcp.async_save(
        state,
        storage_writer=storage.writer(),
        planner=planner,
        async_checkpointer_type=process,
    )
    state["a"] += 1
    done.result()
    same(storage.load({"a": torch.zeros(2), "k": 0}), {"a": torch.ones(2), "k": 1})


NESTED = {"m": {"a": torch.ones(3), "n": 2}, "k": 5, "l": [torch.ones(1), 4]}


@one
def some_keys(storage: Storage) -> None:
    storage.save(NESTED)
    same(_load_state_dict_from_keys({"m"}, storage_reader=storage.reader()), {"m": NESTED["m"]})


@one
def one_nested_key(storage: Storage) -> None:
    storage.save(NESTED)
    found = _load_state_dict_from_keys("m.a", storage_reader=storage.reader())
    same(found, {"m": {"a": torch.ones(3)}})


@one
def all_keys(storage: Storage) -> None:
    storage.save(NESTED)
    same(_load_state_dict_from_keys(storage_reader=storage.reader()), NESTED)


@one
def a_conversion_to_torch_save(storage: Storage) -> None:
    storage.save(NESTED)
    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(found, storage_reader=storage.reader(), planner=planner, no_dist=True)
    torch.save(found, storage.path / "found.pt")
    same(torch.load(storage.path / "found.pt"), NESTED)


@one
def metadata(storage: Storage) -> None:
    saved = storage.save(NESTED)
    found = storage.reader().read_metadata()
    assert found.planner_data == saved.planner_data
    assert found.storage_meta is not None
    assert found.state_dict_metadata.keys() == saved.state_dict_metadata.keys()


@one
def a_planner_that_renames(storage: Storage) -> None:
    class Renaming(dcp.DefaultLoadPlanner):
        def set_up_planner(self, state_dict: Any, *others: Any) -> None:
            super().set_up_planner(state_dict, *others)
            self.state_dict = {f"old_{key}": value for key, value in self.state_dict.items()}

    storage.save({"old_a": torch.ones(2)})
    same(storage.load({"a": torch.zeros(2)}, planner=Renaming()), {"a": torch.ones(2)})


@one
def a_planner_that_converts_at_the_save(storage: Storage) -> None:
    base: Any = SavePlanner if storage.is_store else dcp.DefaultSavePlanner

    class Doubling(base):  # type: ignore[misc]
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return super().transform_object(write_item, object * 2)

    storage.save({"a": torch.ones(2)}, planner=Doubling())
    same(storage.load({"a": torch.zeros(2)}), {"a": torch.full((2,), 2.0)})


@one
def a_planner_that_converts_at_the_load(storage: Storage) -> None:
    class Halving(dcp.DefaultLoadPlanner):
        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            tensor /= 2

    storage.save({"a": torch.full((2,), 4.0)})
    same(storage.load({"a": torch.zeros(2)}, planner=Halving()), {"a": torch.full((2,), 2.0)})


@one
def a_target_on_the_meta_device(storage: Storage) -> None:
    storage.save({"a": {"b": torch.ones(2)}})
    same(storage.load({"a": {"b": torch.empty(2, device="meta")}}), {"a": {"b": torch.ones(2)}})


@one
def a_save_without_collectives(storage: Storage) -> None:
    storage.save({"a": torch.ones(2)}, use_collectives=False)


@one
def an_object_that_only_pickle_can_keep(storage: Storage) -> None:
    storage.save({"a": Path("x")})


@one
def a_tensor_in_a_tuple(storage: Storage) -> None:
    storage.save({"a": (torch.ones(2), 1)})


@one
def a_tensor_subclass(storage: Storage) -> None:
    pair = TwoTensor(torch.ones(2), torch.zeros(2))
    storage.save({"a": pair})
    found = storage.load({"a": TwoTensor(torch.zeros(2), torch.zeros(2))})["a"]
    same((found.a, found.b), (pair.a, pair.b))


# ShardedTensor, in one process and in four.


def chunks(*ranks: int, dim: int = 0) -> ChunkShardingSpec:
    return ChunkShardingSpec(dim=dim, placements=[f"rank:{rank}/cpu" for rank in ranks])


def rows(*sizes: tuple[int, int]) -> EnumerableShardingSpec:
    """Return a layout of rows: the number of rows and the rank of each shard."""
    shards, first = [], 0
    for size, rank in sizes:
        place = f"rank:{rank}/cpu"
        shards.append(ShardMetadata([first, 0], [size, 20], place))
        first += size
    return EnumerableShardingSpec(shards)


def whole(tensor: Any) -> torch.Tensor:
    """Return the whole of a sharded tensor, in every rank."""
    shards = [(s.metadata.shard_offsets, s.tensor.detach()) for s in tensor.local_shards()]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, shards)
    result = torch.full(tuple(tensor.metadata().size), float("nan"))
    for offsets, part in (shard for shards in parts for shard in shards):
        place = zip(offsets, part.shape, strict=True)
        result[tuple(slice(first, first + size) for first, size in place)] = part
    return result


def reshard(storage: Storage, before: Any, after: Any) -> None:
    saved = sharded_tensor.rand(before, 10, 20)
    target = sharded_tensor.zeros(after, 10, 20)
    storage.save({"w": saved})
    storage.load({"w": target})
    same(whole(target), whole(saved))


@one
def a_sharded_tensor(storage: Storage) -> None:
    reshard(storage, chunks(0), chunks(0))


@one
def a_sharded_tensor_in_other_shards(storage: Storage) -> None:
    reshard(storage, chunks(0, 0, 0), rows((2, 0), (8, 0)))


@one
def a_sharded_tensor_becomes_a_tensor_and_back(storage: Storage) -> None:
    sharded = sharded_tensor.rand(chunks(*range(dist.get_world_size())), 10, 20)
    plain = torch.arange(200.0).reshape(10, 20)
    storage.save({"a": sharded, "b": plain})
    after = sharded_tensor.zeros(chunks(*reversed(range(dist.get_world_size())), dim=1), 10, 20)
    target = {"a": torch.zeros(10, 20), "b": after}
    storage.load(target)
    same(target["a"], whole(sharded))
    same(whole(after), plain)


four(a_sharded_tensor_becomes_a_tensor_and_back)


@four
def sharded_tensors_in_other_layouts(storage: Storage) -> None:
    layouts = [chunks(0, 1, 2, 3), chunks(1, 0, 0, 3, 2), rows((2, 0), (1, 1), (3, 0), (4, 3))]
    for before in layouts:
        for after in layouts:
            reshard(storage, before, after)


@four
def sharded_tensors_by_rows_and_by_columns(storage: Storage) -> None:
    reshard(storage, chunks(0, 1, 2, 3), chunks(0, 1, 2, 3, dim=1))
    reshard(storage, chunks(0, 1, 2, 3, dim=1), chunks(0, 1, 2, 3))


@four
def a_sharded_tensor_that_one_rank_holds(storage: Storage) -> None:
    reshard(storage, chunks(1), chunks(2))


VALUES = torch.arange(56.0).reshape(8, 7)


def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def moves(storage: Storage, before: Any, after: Any) -> None:
    """Save and load a tensor with one mesh and placements before, and others after."""
    storage.save({"d": distribute_tensor(VALUES, *before)})
    target = distribute_tensor(torch.zeros(8, 7), *after)
    storage.load({"d": target})
    same(target.full_tensor(), VALUES)


PLACES: dict[str, Any] = {
    "rr": [Replicate(), Replicate()],
    "rs": [Replicate(), Shard(0)],
    "sr": [Shard(0), Replicate()],
    "ss": [Shard(0), Shard(1)],
}
for _a in PLACES:
    for _b in PLACES:
        if _a != _b:
            FOUR[f"dtensor_{_a}_to_{_b}"] = lambda storage, a=_a, b=_b: moves(  # type: ignore[misc]
                storage, (mesh(2, 2), PLACES[a]), (mesh(2, 2), PLACES[b])
            )


@four
def dtensors_in_one_dimension(storage: Storage) -> None:
    for a in ([Replicate()], [Shard(0)], [Shard(1)]):
        for b in ([Shard(1)], [Replicate()], [Shard(0)]):
            moves(storage, (mesh(4), a), (mesh(4), b))


@four
def dtensors_in_a_mesh_of_other_dimensions(storage: Storage) -> None:
    for places in PLACES.values():
        moves(storage, (mesh(4), [Shard(0)]), (mesh(2, 2), places))
        moves(storage, (mesh(2, 2), places), (mesh(4), [Shard(1)]))


@four
def a_dtensor_of_two_ranks(storage: Storage) -> None:
    half = DeviceMesh("cpu", [1, 3])
    tensor = distribute_tensor(VALUES, half, [Shard(0)])
    storage.save({"d": tensor, "w": torch.ones(2)})
    target = {"d": torch.zeros(8, 7), "w": torch.zeros(2)}
    same(storage.load(target), {"d": VALUES, "w": torch.ones(2)})


def gathered(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor()
        if isinstance(value, DTensor)
        else value.clone()
        if not hasattr(value, "local_shards")
        else whole(value)
        for name, value in state.items()
    }


def models(storage: Storage, before: Any, after: Any) -> None:
    """Save one model and load its weights into another one."""
    storage.save({"model": before.state_dict()})
    expected = gathered(before.state_dict())
    state = {"model": after.state_dict()}
    storage.load(state)
    after.load_state_dict(state["model"])
    same(gathered(after.state_dict()), expected)


def fsdp1(seed: int, inner: Any = None, **options: Any) -> torch.nn.Module:
    kind = torch.distributed.fsdp.StateDictType.SHARDED_STATE_DICT
    inner = inner or model(seed)
    module = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), **options)
    FullyShardedDataParallel.set_state_dict_type(module, kind)
    return module


def fsdp2(seed: int, *shape: int) -> torch.nn.Module:
    return fully_shard(model(seed), mesh=mesh(*shape))  # type: ignore[return-value]


def parallel(seed: int) -> torch.nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model(seed), mesh(4), plan)


@four
def fsdp1_with_sharded_tensors(storage: Storage) -> None:
    models(storage, fsdp1(0), fsdp1(1))


@four
def fsdp1_with_its_optimizer(storage: Storage) -> None:
    def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        # DCP cannot load the state of an optimizer into a rank that has no rows of a parameter.
        module = fsdp1(seed, torch.nn.Linear(6, 8))
        updates = torch.optim.AdamW(module.parameters())
        module(torch.randn(3, 6)).square().sum().backward()
        updates.step()
        return module, updates

    before, after = make(0), make(1)
    state = FullyShardedDataParallel.optim_state_dict(*before)
    assert hasattr(state["state"]["weight"]["exp_avg"], "local_shards")
    storage.save({"optimizer": state})
    found = FullyShardedDataParallel.optim_state_dict(*after)
    storage.load({"optimizer": found})
    after[1].load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(*after, found))
    same(flatten(after[1].state_dict())[0], flatten(before[1].state_dict())[0])


@four
def fsdp1_with_dtensors(storage: Storage) -> None:
    models(storage, fsdp1(0, device_mesh=mesh(4)), fsdp1(1, device_mesh=mesh(4)))


@four
def hybrid_sharding_becomes_full_sharding(storage: Storage) -> None:
    hybrid = ShardingStrategy.HYBRID_SHARD
    before = fsdp1(0, device_mesh=mesh(2, 2), sharding_strategy=hybrid)
    models(storage, before, fsdp1(1, device_mesh=mesh(4)))


@four
def fsdp2_in_other_meshes(storage: Storage) -> None:
    models(storage, fsdp2(0, 4), fsdp2(1, 2, 2))


@four
def tensor_parallel_becomes_fsdp2(storage: Storage) -> None:
    models(storage, parallel(0), parallel(1))
    models(storage, parallel(0), fsdp2(1, 4))


def in_two_dimensions(seed: int) -> torch.nn.Module:
    """Return a model under tensor parallelism and FSDP2."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    module = parallelize_module(model(seed), both["tensor"], plan)
    return fully_shard(module, mesh=both["data"])  # type: ignore[return-value]


@four
def fsdp2_with_tensor_parallel(storage: Storage) -> None:
    models(storage, in_two_dimensions(0), in_two_dimensions(1))
    models(storage, in_two_dimensions(0), fsdp2(1, 4))
    models(storage, fsdp2(0, 4), in_two_dimensions(1))


@four
def keys_and_values_of_one_rank_only(storage: Storage) -> None:
    rank = dist.get_rank()
    storage.save({f"w{rank}": torch.full((2,), float(rank)), f"k{rank}": rank, "all": [1]})
    found = storage.load({f"w{rank}": torch.zeros(2), f"k{rank}": -1, "all": []})
    same(found, {f"w{rank}": torch.full((2,), float(rank)), f"k{rank}": rank, "all": [1]})


@four
def some_of_the_ranks(storage: Storage) -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        storage.save({"a": torch.ones(2), "k": 1}, process_group=group)
    dist.barrier()
    same(storage.load({"a": torch.zeros(2), "k": 0}), {"a": torch.ones(2), "k": 1})


@four
def a_rank_that_fails(storage: Storage) -> None:
    base: Any = SavePlanner if storage.is_store else dcp.DefaultSavePlanner

    class Failing(base):  # type: ignore[misc]
        def resolve_data(self, write_item: Any) -> Any:
            raise ValueError("no luck")

    planner = Failing() if dist.get_rank() == 2 else base()
    with pytest.raises(dcp.CheckpointException, match=r"RANK 2(.|\n)*no luck"):
        storage.save({f"w{dist.get_rank()}": torch.ones(2)}, planner=planner)


REFUSED = {
    "a_target_of_another_dtype": "Nothing was changed",
    "a_save_without_collectives": "use_collectives=True",
    "an_object_that_only_pickle_can_keep": "a is a PosixPath",
    "a_tensor_in_a_tuple": "use a list",
    "a_tensor_subclass": "'a' is a TwoTensor",
}
"""The reason why a store refuses a scenario: the first one at the load, the others at the save."""

FAILED_BY_DCP = {"a_state_that_is_not_flattened", "a_tensor_subclass"}
"""Scenarios that fail with DCP's own storage: its planner drops the values, or does not unpickle
them."""


def outcomes(folder: Path, ranks: int, *, is_store: bool) -> list[dict[str, str]]:
    """Run all scenarios of a number of ranks; return the errors of each rank by scenario."""
    scenarios = ONE if ranks == 1 else FOUR

    def act(rank: int) -> None:
        warnings.simplefilter("ignore")
        errors = {}
        for name, scenario in scenarios.items():
            path = folder / name
            path.mkdir(exist_ok=True)
            try:
                scenario(Storage(path, is_store))
            except BaseException as error:
                errors[name] = f"{type(error).__name__}: {error}"
            dist.barrier()
        (folder / f"errors-{rank}").write_text(json.dumps(errors), encoding="utf-8")

    assert in_ranks(ranks, act, folder) == [0] * ranks
    files = [folder / f"errors-{rank}" for rank in range(ranks)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.fixture(scope="module", params=["DCP", "store"])
def storage_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(
    storage_kind: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, str]]]:
    is_store = storage_kind == "store"
    return {
        ranks: outcomes(tmp_path_factory.mktemp("ranks"), ranks, is_store=is_store)
        for ranks in (1, 4)
    }


CASES = [(1, name) for name in ONE] + [(4, name) for name in FOUR]


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_a_scenario_of_pytorch(
    found: dict[int, list[dict[str, str]]], storage_kind: str, ranks: int, name: str
) -> None:
    errors = {rank: errors[name] for rank, errors in enumerate(found[ranks]) if name in errors}
    if storage_kind == "store" and name in REFUSED:
        assert REFUSED[name] in errors[0]
    elif storage_kind == "DCP" and name in FAILED_BY_DCP:
        assert errors
    else:
        assert errors == {}
