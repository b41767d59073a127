"""Use a store with ``torch.distributed.checkpoint`` in real processes, with DDP and FSDP2."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,
    _load_state_dict_from_keys,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from msft_store import Base, InvalidInputError, MismatchError, Parts, Store, flatten
from msft_store.cli.main import main
from msft_store.integrations.dcp import (
    LoadPlanner,
    SavePlanner,
    StorageReader,
    StorageWriter,
    boxes_of,
)
from tests.support.ranks import in_ranks
from tests.support.states import State, same_bits

WIDTH = 48


def make_model(seed: int = 0) -> torch.nn.Module:
    """Return a small model with a tied weight and a first dimension not divisible by 4."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, WIDTH),
        torch.nn.Linear(WIDTH, 2 * WIDTH),
        torch.nn.GELU(),
        torch.nn.Linear(2 * WIDTH, WIDTH),
        torch.nn.LayerNorm(WIDTH),
    )
    return model.to(torch.bfloat16)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        tokens = torch.arange(8).reshape(2, 4) + step
        model(tokens).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(seed: int = 0) -> torch.nn.Module:
    """Return the model under FSDP2, over all ranks."""
    model = make_model(seed)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model[1], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def wrapped(seed: int = 0) -> torch.nn.Module:
    """Return the model under DDP."""
    return DistributedDataParallel(make_model(seed))


def whole(tree: Any) -> State:
    """Return all tensors of a nested state by name, gathered from all ranks."""
    tensors, _ = flatten(tree)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "epoch": 3, "losses": [0.5, float("nan")]}


def save_here(
    store: Path, expected: Path, make: Callable[[], torch.nn.Module], **options: Any
) -> None:
    """Train and save in all ranks; rank 0 also writes the expected tensors."""
    model = make()
    optimizer = make_optimizer(model)
    train(model, optimizer)
    state = state_of(model, optimizer)
    writer = StorageWriter(store, **options)
    dcp.save(state, storage_writer=writer, planner=SavePlanner())
    gathered = whole(state)
    if torch.distributed.get_rank() == 0:
        assert writer.checkpoint is not None
        safetensors.torch.save_file(gathered, expected)


def load_here(store: Path, expected: Path, make: Callable[[], torch.nn.Module], name: str) -> None:
    """Load into a model with other weights and a new optimizer, and compare all tensors."""
    model = make()
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    state = state_of(model, optimizer)
    state["epoch"], state["losses"] = 0, []
    dcp.load(state, storage_reader=StorageReader(store, name=name), planner=LoadPlanner())
    assert same_bits(whole(state), safetensors.torch.load_file(expected))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert same_bits(whole(state_of(model, optimizer)), safetensors.torch.load_file(expected))
    assert state["epoch"] == 3
    assert str(state["losses"]) == "[0.5, nan]"


MODELS = {"ddp": wrapped, "fsdp2": sharded}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (4, 2)])
def test_other_numbers_of_ranks_load_a_checkpoint(
    tmp_path: Path, kind: str, before: int, after: int
) -> None:
    store, expected, make = tmp_path / "store", tmp_path / "expected", MODELS[kind]

    saves = in_ranks(
        before, lambda _: save_here(store, expected, make, name="latest", step=2), tmp_path
    )
    loads = in_ranks(
        after, lambda _: load_here(store, expected, lambda: make(1), "latest"), tmp_path
    )

    assert saves == [0] * before
    assert loads == [0] * after
    opened = Store.open(store)
    assert opened.check() == []
    assert [checkpoint.step for checkpoint in opened.log()] == [2]
    if kind == "fsdp2":
        assert len(list(store.glob("packs/*.pack"))) >= before


def test_fsdp2_and_ddp_read_each_other(tmp_path: Path) -> None:
    store, expected = tmp_path / "store", tmp_path / "expected"

    def load(_: int) -> None:
        model = wrapped(1)
        state = {"model": get_state_dict(model, make_optimizer(model))[0]}
        dcp.load(state, storage_reader=StorageReader(store, name="a"), planner=LoadPlanner())
        saved = safetensors.torch.load_file(expected)
        assert same_bits(whole(state), {n: t for n, t in saved.items() if n.startswith("model.")})

    assert in_ranks(2, lambda _: save_here(store, expected, sharded, name="a"), tmp_path) == [0, 0]
    assert in_ranks(2, load, tmp_path) == [0, 0]


@pytest.fixture
def based(tmp_path: Path) -> tuple[Path, Base]:
    """A store with the untrained model as its base."""
    safetensors.torch.save_file(make_model().state_dict(), tmp_path / "base.safetensors")
    store = Store.create(tmp_path / "store")
    return tmp_path / "store", store.add_base(tmp_path / "base.safetensors")


def save_weights(store: Path, parent: str | None, name: str, steps: int) -> None:
    model = sharded()
    train(model, make_optimizer(model), steps)
    writer = StorageWriter(store, name=name, parent=parent)
    dcp.save({"model": model.state_dict()}, storage_writer=writer, planner=SavePlanner())


def test_deltas_are_against_a_base_or_a_checkpoint_of_other_ranks(
    tmp_path: Path, based: tuple[Path, Base]
) -> None:
    path, base = based
    size = base.logical_bytes

    assert in_ranks(2, lambda _: save_weights(path, base.id, "one", 1), tmp_path) == [0, 0]
    assert in_ranks(4, lambda _: save_weights(path, "one", "two", 2), tmp_path) == [0] * 4

    store = Store.open(path)
    one, two = store.get("one"), store.get("two")
    assert two.parent == one.id
    assert (one.base, two.base) == (base.id, base.id)
    # A plain copy is the smallest encoding of the few bytes of a norm.
    assert max(one.unreferenced_bytes, two.unreferenced_bytes) < 0.02 * size
    assert max(one.stored_bytes, two.stored_bytes) < 0.4 * size
    assert store.check() == []
    expected = store.load(two)
    store.anchor(two)
    store.unpin("one")
    store.forget(one)
    store.plan_gc().execute()
    assert store.check() == []
    assert same_bits(store.load(two), expected)


def test_a_checkpoint_is_one_like_any_other(tmp_path: Path, based: tuple[Path, Base]) -> None:
    path, base = based

    def save(_: int) -> None:
        model = sharded()
        train(model, make_optimizer(model))
        writer = StorageWriter(path, name="flat", parent=base)
        dcp.save(model.state_dict(), storage_writer=writer)

    assert in_ranks(2, save, tmp_path) == [0, 0]
    store = Store.open(path)
    alone = make_model()
    train(alone, make_optimizer(alone))

    assert same_bits(store.load("flat"), alone.state_dict())
    store.export("flat", tmp_path / "out")
    exported = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert same_bits(exported, alone.state_dict())


def test_an_export_is_the_model_alone_under_the_names_of_the_base(
    tmp_path: Path, based: tuple[Path, Base], capsys: pytest.CaptureFixture[str]
) -> None:
    path, base = based

    def save(_: int) -> None:
        model = wrapped()
        optimizer = make_optimizer(model)
        train(model, optimizer)
        state = state_of(model, optimizer)
        for name, tree, parent in (("a", state, base), ("b", {"run": state}, base)):
            writer = StorageWriter(path, name=name, parent=parent, metadata={"mine": 1})
            dcp.save(tree, storage_writer=writer, planner=SavePlanner())
        dcp.save(state, storage_writer=StorageWriter(path, name="c"), planner=SavePlanner())

    assert in_ranks(2, save, tmp_path) == [0, 0]
    store = Store.open(path)
    alone = make_model()
    train(alone, make_optimizer(alone))
    for name in "ab":
        capsys.readouterr()
        assert main(["--store", str(path), "export", name, str(tmp_path / name)]) == 0
        assert "left out, as no part of the model: " in capsys.readouterr().out
        exported = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert same_bits(exported, alone.state_dict())
        assert store.get(name).metadata["mine"] == 1
    store.export("c", tmp_path / "c")
    names = safetensors.torch.load_file(tmp_path / "c" / "model.safetensors").keys()
    assert names == store.tensors("c").keys() - {"dcp.json"}


def test_dcp_loads_a_checkpoint_of_store_save(tmp_path: Path, based: tuple[Path, Base]) -> None:
    path, _ = based
    state = make_model(5).state_dict()
    Store.open(path).save(state)
    identity = Store.open(path).log()[0].id

    def load(_: int) -> None:
        mine = sharded().state_dict()
        dcp.load(mine, storage_reader=StorageReader(path, name=identity))
        assert same_bits(whole(mine), state)

    assert in_ranks(2, load, tmp_path) == [0, 0]


def test_an_async_save_completes_in_the_background(tmp_path: Path) -> None:
    store = tmp_path / "store"

    def save(_: int) -> None:
        model = sharded()
        before = whole({"model": model.state_dict()})
        # One group is for training, the other one for the save in the background.
        done = dcp.async_save(
            {"model": model.state_dict()},
            storage_writer=StorageWriter(store, name="early"),
            planner=SavePlanner(),
            process_group=torch.distributed.new_group(backend="gloo"),
        )
        train(model, make_optimizer(model))
        done.result()
        loaded = sharded(1).state_dict()
        state = {"model": loaded}
        dcp.load(state, storage_reader=StorageReader(store, name="early"), planner=LoadPlanner())
        assert same_bits(whole(state), before)

    assert in_ranks(2, save, tmp_path) == [0, 0]


class Dying(SavePlanner):
    """Kills its process before it writes the last item."""

    def resolve_data(self, write_item: Any) -> Any:
        if write_item == self.plan.items[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_leaves_no_checkpoint_and_no_damage(
    tmp_path: Path, victim: int
) -> None:
    store, expected = tmp_path / "store", tmp_path / "expected"
    assert in_ranks(2, lambda _: save_here(store, expected, sharded, name="a"), tmp_path) == [0, 0]
    before, size = Store.open(store).log(), Store.open(store).stats().stored_bytes

    def save(rank: int) -> None:
        planner = Dying() if rank == victim else SavePlanner()
        writer = StorageWriter(store, name="a", parent="a")
        dcp.save({"model": sharded(7).state_dict()}, storage_writer=writer, planner=planner)

    codes = in_ranks(2, save, tmp_path)

    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0
    opened = Store.open(store)
    assert opened.log() == before
    assert opened.check() == []
    opened.plan_gc().execute()
    assert opened.stats().stored_bytes <= size
    assert in_ranks(2, lambda _: load_here(store, expected, lambda: sharded(1), "a"), tmp_path) == [
        0,
        0,
    ]


class Failing(SavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        raise OSError("no such luck")


def test_a_save_that_fails_in_another_rank_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def save(rank: int) -> None:
        planner = SavePlanner() if rank == 0 else Failing()
        state = {"model": sharded().state_dict()}
        writer = StorageWriter(path, name="a")
        with pytest.raises(dcp.CheckpointException, match=r"RANK 1(.|\n)*no such luck"):
            dcp.save(state, storage_writer=writer, planner=planner)
        torch.distributed.barrier()
        if rank == 0:
            store = Store.open(path)
            # Other processes can run gc, although the writer still exists.
            assert store.locks() == []
            assert store.log() == []
            store.plan_gc().execute()
        torch.distributed.barrier()
        dcp.save(state, storage_writer=StorageWriter(path, name="a"), planner=SavePlanner())

    assert in_ranks(2, save, tmp_path) == [0, 0]
    assert Store.open(path).refs().keys() == {"a"}


def test_ranks_with_a_path_each_are_reported(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "own-0")
    store.pin(store.save({"w": torch.ones(3)}), "a")

    def act(rank: int) -> None:
        mine, state = tmp_path / f"own-{rank}", {"w": torch.zeros(3), "v": torch.zeros(3)}
        with pytest.raises(dcp.CheckpointException, match=r"rank 1 finds no store(.|\n)*share"):
            dcp.save(state, storage_writer=StorageWriter(mine, name="b"))
        with pytest.raises(dcp.CheckpointException, match="no store"):
            dcp.load({"w": torch.zeros(3)}, storage_reader=StorageReader(mine, name="a"))

    assert in_ranks(2, act, tmp_path) == [0, 0]
    assert store.refs().keys() == {"a"}


def test_tied_tensors_are_compared_under_the_name_that_the_parent_has(
    tmp_path: Path,
) -> None:
    weights = {"body": torch.randn(64, 64), "embed": torch.randn(64, 64)}
    safetensors.torch.save_file(weights, tmp_path / "base.safetensors")
    store = Store.create(tmp_path / "store")
    base = store.add_base(tmp_path / "base.safetensors")
    trained = {name: tensor + 1e-3 for name, tensor in weights.items()}
    tied = {"head": trained["embed"], "body": trained["body"], "embed": trained["embed"]}

    def save(_: int) -> None:
        # DCP distributes the names: one rank has the head, the other one its tied tensor.
        dcp.save(tied, storage_writer=StorageWriter(store.path, name="a", parent=base))

    assert in_ranks(2, save, tmp_path) == [0, 0]
    saved = store.get("a")
    assert saved.unreferenced_bytes == 0
    assert same_bits(store.load(saved), tied)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plans_that_dcp_caches_get_the_new_parent(tmp_path: Path) -> None:
    path, state = tmp_path / "store", {"w": torch.randn(64, 64), "step": 1}

    def save(name: str, planner: Any, **options: Any) -> None:
        dcp.save(
            state,
            storage_writer=StorageWriter(path, name=name, **options),
            planner=planner,
        )

    save("one", SavePlanner(enable_plan_caching=True))
    state["w"] = state["w"] + 1e-3
    save("two", SavePlanner(enable_plan_caching=True), parent="one")

    assert Store.open(path).get("two").unreferenced_bytes == 0
    del state["step"]
    with pytest.raises(dcp.CheckpointException, match="enable_plan_caching=True"):
        save("three", dcp.DefaultSavePlanner(enable_plan_caching=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_parent_that_moves_during_a_save_is_resolved_once(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    one, two = store.save({"w": torch.ones(3)}), store.save({"w": torch.zeros(3)})
    store.pin(one, "last")

    class Moving(SavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            store.pin(two, "last")
            return super().resolve_data(write_item)

    writer = StorageWriter(store.path, parent="last")
    dcp.save({"w": torch.ones(3)}, storage_writer=writer, planner=Moving())

    assert writer.checkpoint is not None
    assert writer.checkpoint.parent == one.id


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_that_is_not_flattened_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "store"
    # A coordinator that is killed while it makes the store leaves this folder behind.
    (path / "tmp").mkdir(parents=True)
    state = {"w": torch.ones(3), "rest": {"epoch": 3, "names": ["a"]}}

    dcp.save(
        state,
        storage_writer=StorageWriter(path, name="a"),
        planner=SavePlanner(flatten_state_dict=False),
    )
    target: dict[str, Any] = {"w": torch.zeros(3), "rest": None}
    dcp.load(
        target,
        storage_reader=StorageReader(path, name="a"),
        planner=LoadPlanner(flatten_state_dict=False),
    )

    assert target["rest"] == state["rest"]
    assert same_bits({"w": target["w"]}, {"w": state["w"]})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcps_own_planner_is_refused_where_it_would_pickle(tmp_path: Path) -> None:
    state = {"weight": torch.ones(3), "epoch": 3}

    with pytest.raises(dcp.CheckpointException, match=r"planner=SavePlanner\(\)"):
        dcp.save(state, storage_writer=StorageWriter(tmp_path / "store", name="a"))
    assert Store.open(tmp_path / "store").log() == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_that_json_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    writer = StorageWriter(tmp_path / "store", name="a")

    with pytest.raises(dcp.CheckpointException, match=r"extra\.callback"):
        dcp.save({"extra": {"callback": print}}, storage_writer=writer, planner=SavePlanner())
    pair = (torch.ones(2), torch.zeros(2))
    with pytest.raises(dcp.CheckpointException, match=r"pair is a tuple with tensors.*use a list"):
        dcp.save({"pair": pair}, storage_writer=writer, planner=SavePlanner())
    assert Store.open(tmp_path / "store").log() == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_target_of_another_dtype_is_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, storage_writer=StorageWriter(tmp_path / "store", name="a"))

    with pytest.raises(dcp.CheckpointException, match="Nothing was changed"):
        dcp.load(
            {"w": torch.ones(3).half()}, storage_reader=StorageReader(tmp_path / "store", name="a")
        )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_checkpoint_id_of_dcp_is_the_name(tmp_path: Path) -> None:
    path = tmp_path / "store"
    state = {"w": torch.ones(3)}

    dcp.save(state, checkpoint_id="step-1", storage_writer=StorageWriter(path))
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id="step-1", storage_reader=StorageReader(path))

    assert same_bits(target, state)
    with pytest.raises(InvalidInputError, match="name"):
        StorageWriter(path, name="not a name")
    with pytest.raises(dcp.CheckpointException, match="needs a name"):
        dcp.load(target, storage_reader=StorageReader(path))


def test_boxes_of_sharded_tensors_go_without_dcp(tmp_path: Path) -> None:
    path = tmp_path / "store"
    Store.create(path)
    weights = make_model(3).state_dict()

    def save(rank: int) -> None:
        store, model = Store.open(path), sharded(3)
        parts: list[Any] = [None, None]
        torch.distributed.all_gather_object(parts, store.encode(boxes_of(model.state_dict())))
        if rank == 0:
            store.pin(store.save(Parts(parts)), "a")
        torch.distributed.barrier()
        other = sharded(4)
        store.load_boxes("a", boxes_of(other.state_dict()))
        assert same_bits(whole(other.state_dict()), weights)
        mesh = init_device_mesh("cpu", (2,))
        terms = {"sum": DTensor.from_local(torch.ones(2), mesh, [Partial()])}
        with pytest.raises(InvalidInputError, match="sum is a DTensor with partial"):
            boxes_of(terms)
        with pytest.raises(dcp.CheckpointException, match="sum is a DTensor with partial"):
            dcp.save(terms, storage_writer=StorageWriter(path), planner=SavePlanner())

    assert in_ranks(2, save, tmp_path) == [0, 0]
    with pytest.raises(MismatchError):
        Store.open(path).load_boxes("a", boxes_of({"other": torch.ones(1)}))


def one_process(path: Path) -> tuple[StorageWriter, StorageReader]:
    return StorageWriter(path, name="a"), StorageReader(path, name="a")


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_dcps_own_planner_for_loading_gets_the_values(tmp_path: Path) -> None:
    writer, reader = one_process(tmp_path / "store")
    blob = io.BytesIO(b"state of a module")
    blob.seek(3)
    state = {"w": torch.ones(3), "rest": {"epoch": 3, "names": ("a", "b"), "blob": blob}}
    dcp.save(state, storage_writer=writer, planner=SavePlanner())

    for planner in (LoadPlanner(), dcp.DefaultLoadPlanner()):
        target: dict[str, Any] = {"w": torch.zeros(3), "rest": dict.fromkeys(state["rest"])}
        dcp.load(target, storage_reader=reader, planner=planner)
        assert (target["rest"]["epoch"], target["rest"]["names"]) == (3, ("a", "b"))
        assert target["rest"]["blob"].read() == b"te of a module"
        assert same_bits({"w": target["w"]}, {"w": state["w"]})
    assert b"pickle" not in Store.open(tmp_path / "store").load("a")["dcp.json"].numpy().tobytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_a_checkpoint_knows_the_nested_state_that_it_was_saved_from(tmp_path: Path) -> None:
    writer, reader = one_process(tmp_path / "store")
    weights = {"a.b": torch.ones(3), "c": [torch.zeros(2), 7]}
    state = {"model": weights, "k": 5, "flat.name": torch.ones(1)}
    saved = dcp.save(state, storage_writer=writer, planner=SavePlanner())

    found: dict[str, Any] = {}
    _load_state_dict(found, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    part = _load_state_dict_from_keys({"model"}, storage_reader=reader)
    metadata = reader.read_metadata()

    torch.testing.assert_close(found, state, rtol=0, atol=0)
    torch.testing.assert_close(part, {"model": weights}, rtol=0, atol=0)
    assert metadata.planner_data == saved.planner_data
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.checkpoint_id == "a"
    assert saved.storage_meta is not None
    for name in ("$paths", "dcp.json"):
        with pytest.raises(dcp.CheckpointException, match="the store's own"):
            dcp.save({name: 1}, storage_writer=writer, planner=SavePlanner())


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_values_below_integer_keys_come_back_under_them(tmp_path: Path) -> None:
    path = tmp_path / "store"
    # A checkpoint that was saved before the store kept the places of the nested state.
    text = b'{"optim.groups.0.lr":0.5,"optim.state.0.n":4,"optim.state.7.n":5,"optim.state.x.n":6}'
    document = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    store = Store.create(path)
    old = store.save({"optim.state.0.m": torch.ones(2), "dcp.json": document})
    state = {
        "state": {0: {"m": torch.ones(2), "n": 4}, 7: {"n": 5}, "x": {"n": 6}},
        "groups": [{"lr": 0.5}],
    }
    dcp.save({"optim": state}, storage_writer=one_process(path)[0], planner=SavePlanner())

    for name in (old.id, "a"):
        target: dict[str, Any] = {
            "state": {0: {"m": torch.zeros(2), "n": 0}, 7: {"n": 0}, "x": {"n": 0}},
            "groups": [{"lr": 0.0}],
        }
        reader = StorageReader(path, name=name)
        dcp.load({"optim": target}, storage_reader=reader, planner=LoadPlanner())
        assert str(target) == str(state)
    reader = StorageReader(path, name=old.id)
    flat = _load_state_dict_from_keys({"optim.state.0.n"}, storage_reader=reader)
    assert flat == {"optim.state.0.n": 4}


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
@pytest.mark.parametrize("planner", [LoadPlanner, dcp.DefaultLoadPlanner])
def test_a_load_that_is_refused_changes_nothing(tmp_path: Path, planner: Any) -> None:
    writer, reader = one_process(tmp_path / "store")
    state = {"a": {"x": 7}, "w": torch.ones(3), "z": torch.ones(2)}
    dcp.save(state, storage_writer=writer, planner=SavePlanner())

    for wrong in ({"z": torch.zeros(2).half()}, {"z": torch.zeros(5)}, {"missing": 1}):
        target = {"a": {"x": 0}, "w": torch.zeros(3), **wrong}
        with pytest.raises(dcp.CheckpointException):
            dcp.load(target, storage_reader=reader, planner=planner())
        assert target["a"] == {"x": 0}
        assert not target["w"].any()


def test_a_load_that_one_rank_refuses_changes_nothing_in_any_rank(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def act(rank: int) -> None:
        state = {"a": {"x": 7}, "w": torch.ones(3)}
        dcp.save(state, storage_writer=StorageWriter(path, name="a"), planner=SavePlanner())
        dtype = torch.float16 if rank else torch.float32
        target = {"a": {"x": 0}, "w": torch.zeros(3, dtype=dtype)}
        reader = StorageReader(path, name="a")
        with pytest.raises(dcp.CheckpointException, match=r"w is of torch\.float16"):
            dcp.load(target, storage_reader=reader, planner=LoadPlanner())
        assert target["a"] == {"x": 0}
        assert not target["w"].any()

    assert in_ranks(2, act, tmp_path) == [0, 0]


@pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
def test_boxes_of_a_sharded_tensor_are_its_local_shards(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")

    def act(rank: int) -> None:
        spec = ChunkShardingSpec(dim=0, placements=["rank:1/cpu", "rank:0/cpu", "rank:1/cpu"])
        state = {"w": sharded_tensor.full(spec, (5, 2), float(rank))}
        boxes = boxes_of(state)
        assert [box.offset for box in boxes] == ([(0, 0), (4, 0)] if rank else [(2, 0)])
        assert {box.shape for box in boxes} == {(5, 2)}
        dcp.save(state, storage_writer=StorageWriter(store.path, name="a"), planner=SavePlanner())

    assert in_ranks(2, act, tmp_path) == [0, 0]
    assert store.load("a")["w"].tolist() == [[1, 1], [1, 1], [0, 0], [0, 0], [1, 1]]


def test_a_save_does_not_rely_on_a_base_that_changed(tmp_path: Path) -> None:
    weights = {"a": torch.randn(64, 64), "b": torch.randn(64, 64)}
    file = tmp_path / "base.safetensors"
    safetensors.torch.save_file(weights, file)
    store = Store.create(tmp_path / "store")
    base = store.add_base(file)
    safetensors.torch.save_file({**weights, "b": weights["b"] + 1}, file)

    def save(_: int) -> None:
        for name, state in (("same", weights), ("moved", {n: t * 2 for n, t in weights.items()})):
            writer = StorageWriter(store.path, name=name, parent=base)
            dcp.save(state, storage_writer=writer, planner=SavePlanner())
            found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            reader = StorageReader(store.path, name=name)
            dcp.load(found, storage_reader=reader, planner=LoadPlanner())
            assert same_bits(found, state)

    assert in_ranks(2, save, tmp_path) == [0, 0]
    assert store.get("same").stored_bytes > 0


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
@pytest.mark.parametrize("own", [True, False])
def test_a_compiled_module_has_the_checkpoints_of_the_original(
    tmp_path: Path, *, own: bool
) -> None:
    writer, reader = one_process(tmp_path / "store")
    plain, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    options = [{"planner": SavePlanner()}, {"planner": LoadPlanner()}] if own else [{}, {}]
    state: dict[str, Any] = {"model": torch.compile(plain, backend="eager").state_dict()}
    state |= {"lr": 0.5} if own else {}
    dcp.save(state, storage_writer=writer, **options[0])

    found = Store.open(tmp_path / "store").tensors("a").keys() - {"dcp.json"}
    assert found == {"model.weight", "model.bias"}
    assert reader.read_metadata().planner_data["model.bias"] == ("model", "bias")
    for module in (other, torch.compile(other, backend="eager")):
        torch.nn.init.zeros_(other.weight)
        target = {**state, "model": module.state_dict(), **({"lr": 0.0} if own else {})}
        dcp.load(target, storage_reader=reader, **options[1])
        assert same_bits(other.state_dict(), plain.state_dict())
        assert target.get("lr") == state.get("lr")
    both = {"w": torch.ones(2), "_orig_mod.w": torch.zeros(2)}
    with pytest.raises(dcp.CheckpointException, match="differ only in '_orig_mod'"):
        dcp.save(both, storage_writer=writer)
