"""The reader of a checkpoint has the methods of an open safetensors file, and reads little."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import msft_store
from msft_store import (
    Base,
    Box,
    Checkpoint,
    CorruptedError,
    InvalidInputError,
    MismatchError,
    Parts,
    Store,
    UnknownCheckpointError,
)
from msft_store.integrations.remote import push
from tests.store.integrations.test_families import mixtral, train
from tests.support.states import State, same_bits, train_step

SHAPES = ((), (5,), (0, 3), (4, 6), (3, 1, 5), (2, 3, 4), (1, 4, 1, 3))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return a reader and an open safetensors file with the same tensors, one cut into boxes."""
    folder = tmp_path_factory.mktemp("reader")
    generator = torch.Generator().manual_seed(0)
    state = {f"t{at}": torch.randn(shape, generator=generator) for at, shape in enumerate(SHAPES)}
    cut = torch.randn(4, 6, generator=generator)
    store = Store.create(folder / "store")
    boxes = [
        Box(name="cut", shape=(4, 6), offset=(0, first), tensor=cut[:, first : first + 3])
        for first in (0, 3)
    ]
    whole = [
        Box(name=name, shape=tuple(t.shape), offset=(0,) * t.dim(), tensor=t)
        for name, t in state.items()
    ]
    ckpt = store.save(Parts([store.encode([*whole, *boxes])]))
    save_file({**state, "cut": cut}, folder / "all.safetensors")
    return store.open_checkpoint(ckpt), safe_open(folder / "all.safetensors", "pt")


def indices(dims: int) -> st.SearchStrategy[Any]:
    number = st.integers(-7, 7)
    part = st.builds(slice, st.none() | number, st.none() | number, st.none() | st.integers(1, 3))
    item = part | number | st.none()
    several = st.lists(item, max_size=dims + 1).map(tuple)
    dotted = st.tuples(st.lists(item, max_size=1), st.lists(item, max_size=1)).map(
        lambda sides: (*sides[0], ..., *sides[1])
    )
    return st.one_of(item, several, dotted, st.just(...), st.lists(st.integers(-2, 2), max_size=3))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_index_gives_what_torch_gives(data: st.DataObject, pair: tuple[Any, Any]) -> None:
    reader, file = pair
    name = data.draw(st.sampled_from(reader.keys()))
    tensor = file.get_tensor(name)
    index = data.draw(indices(tensor.dim()))
    try:
        expected = tensor[index]
    except IndexError:
        with pytest.raises(IndexError):
            _ = reader.get_slice(name)[index]
        return
    found = reader.get_slice(name)[index]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


def test_names_shapes_and_dtypes_are_those_of_a_file(pair: tuple[Any, Any]) -> None:
    reader, file = pair
    with reader as opened:
        assert opened.keys() == sorted(file.keys())
        for name in file.keys():  # noqa: SIM118
            ours, theirs = opened.get_slice(name), file.get_slice(name)
            assert (ours.get_shape(), ours.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
            assert same_bits({"it": opened.get_tensor(name)}, {"it": file.get_tensor(name)})


def test_masks_and_tensors_select_too(pair: tuple[Any, Any]) -> None:
    reader, file = pair
    tensor, part = file.get_tensor("t3"), reader.get_slice("t3")
    for index in (tensor > 0, torch.tensor([2, 0]), (slice(1, 3), [0, 5]), (0, torch.tensor(1))):
        assert torch.equal(part[index], tensor[index])
    with pytest.raises(ValueError, match="greater than zero"):
        _ = part[::-1]


def test_metadata_says_which_checkpoint_it_is(store: Store) -> None:
    ckpt = store.save({"w": torch.ones(2)}, step=7, metrics={"loss": 0.5}, tags=("mine",))
    found = store.open_checkpoint(ckpt).metadata()
    assert found["checkpoint"] == ckpt.id
    assert (found["format"], found["step"]) == ("pt", "7")
    assert (json.loads(found["metrics"]), json.loads(found["tags"])) == ({"loss": 0.5}, ["mine"])
    assert "step" not in store.open_checkpoint(store.save({"w": torch.ones(2)})).metadata()


def test_only_the_chunks_of_a_slice_are_read_and_each_is_verified(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (2, 3 << 20), generator=generator, dtype=torch.int32)
    ckpt = store.save({"w": values})
    (pack,) = Path(store.path).glob("packs/*")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2 + (1 << 20)] ^= 1  # in the second row
    pack.write_bytes(data)
    part = Store.open(store.path).open_checkpoint(ckpt).get_slice("w")
    assert torch.equal(part[0], values[0])
    assert torch.equal(part[1, -9:], values[1, -9:])
    assert torch.equal(part[:1, 5:9], values[:1, 5:9])
    with pytest.raises(CorruptedError, match="tensor 'w'"):
        _ = part[1, : 2 << 20]


def test_an_address_opens_a_path_or_a_url(
    tmp_path: Path, store: Store, ckpt: Checkpoint, state: State
) -> None:
    store.pin(ckpt, "runs/best")
    expected = train_step(state, 0.05, 1)
    url, memory = (tmp_path / "remote").as_uri(), f"memory://{ckpt.id}/run"
    push(store, url)
    push(store, memory)
    for address in (f"{store.path}@runs/best", f"{url}@{ckpt.id[:8]}", f"{memory}@runs/best"):
        with msft_store.open_checkpoint(address) as reader:
            assert same_bits({n: reader.get_tensor(n) for n in reader.keys()}, expected)  # noqa: SIM118
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    for place in (store.path, url):
        reader = msft_store.open_checkpoint(
            f"{place}@runs/best", bases=[tmp_path / "moved.safetensors"]
        )
        name = "model.embed.weight"
        assert torch.equal(reader.get_slice(name)[3:5], expected[name][3:5])
    with pytest.raises(InvalidInputError, match="STORE@CHECKPOINT"):
        msft_store.open_checkpoint(store.path)
    with pytest.raises(UnknownCheckpointError, match="worst"):
        msft_store.open_checkpoint(f"{store.path}@worst")


def test_the_layout_of_files_is_that_of_an_export(tmp_path: Path, store: Store) -> None:
    torch.manual_seed(0)
    model = mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    train(model)
    ckpt = store.save(model, parent=store.add_base(tmp_path / "base"))
    store.export(ckpt, tmp_path / "out")
    reader = store.open_checkpoint(ckpt, layout="files")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert reader.keys() == sorted(file.keys())
        for name in reader.keys():  # noqa: SIM118
            whole = file.get_tensor(name)
            assert torch.equal(reader.get_tensor(name), whole)
            assert torch.equal(reader.get_slice(name)[1:3], whole[1:3])
    assert store.open_checkpoint(ckpt).keys() == sorted(model.state_dict())


def test_threads_share_a_reader(store: Store, ckpt: Checkpoint, state: State) -> None:
    reader = store.open_checkpoint(ckpt)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(reader.keys(), pool.map(reader.get_tensor, reader.keys()), strict=True))
    assert same_bits(found, train_step(state, 0.05, 1))


def test_wrong_names_and_layouts_are_refused(store: Store, base: Base, ckpt: Checkpoint) -> None:
    with pytest.raises(MismatchError, match=r"no tensor 'nothing', but lm_head\.weight"):
        store.open_checkpoint(ckpt).get_slice("nothing")
    with pytest.raises(InvalidInputError, match="layout"):
        store.open_checkpoint(ckpt, layout="disk")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="no device"):
        store.open_checkpoint(ckpt, device="nowhere")
