"""A load returns every saved bit; a state that cannot be restored is refused at the save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store import (
    Base,
    InvalidInputError,
    KeepLast,
    MismatchError,
    StorageError,
    Store,
    StoreError,
    Timeline,
)
from msft_store.format.dtypes import DTYPES
from tests.support.states import State, bits_of, make_state, same_bits, train_step, write_base

TORCH_DTYPES = [dtype.torch for dtype in DTYPES if dtype.torch is not None]
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of arbitrary bit patterns: NaN payloads, subnormals, both zeros."""
    size = dtype.itemsize
    count = size * torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(store: Store, dtype: torch.dtype) -> None:
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (5, 6), (2, 3, 4, 5)]
    state = {str(shape): random_bits(dtype, shape, 7) for shape in shapes}
    first = store.save(state)
    second = store.save({n: random_bits(dtype, t.shape, 8) for n, t in state.items()}, parent=first)
    assert same_bits(store.load(first), state)
    assert store.load(second)["(5, 6)"].dtype == dtype
    assert store.check() == []


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: "\0" not in name),
        st.tuples(
            st.sampled_from(TORCH_DTYPES),
            st.lists(st.integers(0, 5), max_size=4),
            st.integers(0, 99),
        ),
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_state_dict_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[torch.dtype, list[int], int]],
) -> None:
    store = Store.create(tmp_path_factory.mktemp("any") / "store")
    state = {n: random_bits(d, tuple(shape), seed) for n, (d, shape, seed) in tensors.items()}
    ckpt = store.save(state)
    assert same_bits(Store.open(store.path).load(ckpt.id), state)


def test_tensors_of_any_layout_come_back_row_major(store: Store) -> None:
    plain = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "transposed": plain.t(),
        "strided": plain[::2, 1::3],
        "expanded": plain[:1].expand(5, 6),
        "offset": plain.reshape(-1)[5:9],
        "flipped": plain.flip(0),
        "conjugate": torch.complex(plain, -plain).conj(),
        "negative": torch.complex(plain, plain).conj().imag,
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(plain),
    }
    loaded = store.load(store.save(state))
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.resolve_conj().resolve_neg())
        assert loaded[name].is_contiguous()
        assert not loaded[name].requires_grad


def test_a_tensor_larger_than_a_chunk_comes_back_after_small_changes(
    tmp_path: Path, store: Store
) -> None:
    state = make_state(big=True)
    base = store.add_base(write_base(tmp_path / "big.safetensors", state))
    changed = train_step(state, 0.02, 1)
    first = store.save(changed, parent=base)
    again = train_step(changed, 0.02, 2)
    second = store.save(again, parent=first)
    assert same_bits(store.load(second), again)
    assert same_bits(store.load(first), changed)
    assert second.stored_bytes < 0.05 * second.logical_bytes


def test_names_select_tensors(store: Store, base: Base, state: State) -> None:
    ckpt = store.save(train_step(state, 0.1, 1), parent=base)
    wanted = ["model.scale", "lm_head.weight"]
    assert list(store.load(ckpt, names=wanted)) == wanted
    assert store.load(ckpt, names=[]) == {}
    with pytest.raises(MismatchError, match=r"no model\.scales"):
        store.load(ckpt, names=["model.scales"])


def test_an_empty_state_is_a_checkpoint(store: Store) -> None:
    ckpt = store.save({})
    assert store.load(ckpt) == {}
    assert ckpt.logical_bytes == 0
    assert store.stats().checkpoints == 1


def test_target_and_checkpoint_are_given_in_either_order(store: Store, state: State) -> None:
    ckpt = store.save(state)
    timeline = Timeline(store, None, retention=KeepLast(1))
    calls: list[Callable[[State], object]] = [
        lambda target: store.load_into(target, ckpt),
        lambda target: store.load_into(ckpt, target),
        lambda target: store.load_into(checkpoint=ckpt, target=target),
        lambda target: store.load_into(ckpt.id, into=target),
        lambda target: store.load_into(into=target, checkpoint=ckpt),
        lambda target: timeline.rollback(ckpt, into=target),
        lambda target: timeline.rollback(into=target, checkpoint=ckpt),
    ]
    for call in calls:
        target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        call(target)
        assert same_bits(target, state)
    wrong: list[Any] = [{}, {"target": state}, {"checkpoint": ckpt}, {"into": state}]
    wrong.append({"target": state, "checkpoint": ckpt, "into": state})
    for arguments in wrong:
        with pytest.raises(InvalidInputError):
            store.load_into(**arguments)


def test_numbers_of_numpy_and_torch_are_numbers(store: Store, state: State) -> None:
    ckpt = store.save(state, step=np.int64(3), metrics={"a": np.float32(0.5), "b": np.int8(2)})
    assert ckpt == store.get(store.save(state, step=3, metrics={"a": 0.5, "b": 2.0}))
    assert type(ckpt.step) is int
    assert store.save(state, step=torch.tensor(3), metrics={"a": torch.tensor(0.5), "b": 2}) == ckpt


def test_metadata_comes_back_as_json_has_it(store: Store, state: State) -> None:
    nested = {"list": [1, 2], "text": "é\ud800", "none": None}
    metrics = {"a": 0.1, "nan": float("nan"), "inf": float("inf"), "tensor": torch.tensor(2.5)}
    ckpt = store.save(
        state,
        step=3,
        metrics=metrics,  # type: ignore[arg-type]
        tags=["x", "y"],
        metadata={"tuple": (1, 2), "nested": nested},
    )
    nested["list"] = "changed by the caller afterwards"
    again = Store.open(store.path).get(ckpt.id)
    for one in (ckpt, again):
        assert one.metadata["tuple"] == [1, 2]
        assert one.metadata["nested"]["list"] == [1, 2]
        assert one.metadata["nested"]["text"] == "é\ud800"
        assert (one.step, one.tags) == (3, ("x", "y"))
        assert one.metrics["a"] == 0.1
        assert one.metrics["nan"] != one.metrics["nan"]
        assert (one.metrics["inf"], one.metrics["tensor"]) == (float("inf"), 2.5)


class Tied(torch.nn.Module):
    def __init__(self, seed: int = 0, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 12, bias=False)
        self.norm = torch.nn.BatchNorm1d(8)
        if tied:
            self.head.weight = self.embed.weight


def test_a_module_is_saved_and_restored_in_place(store: Store) -> None:
    source, target = Tied(1), Tied(2)
    ckpt = store.save(source)
    place = target.embed.weight.data_ptr()
    store.load_into(target, ckpt)
    assert same_bits(dict(target.state_dict()), dict(source.state_dict()))
    assert target.head.weight is target.embed.weight
    assert target.embed.weight.data_ptr() == place
    assert target.embed.weight.requires_grad


def test_restoring_reaches_parameters_that_are_not_contiguous(store: Store) -> None:
    source, target = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)
    target.weight = torch.nn.Parameter(torch.zeros(4, 6).t())
    store.load_into(target, store.save(source))
    assert bits_of(target.weight) == bits_of(source.weight)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t,
        lambda t: t.t().contiguous().t(),
        lambda t: torch.empty(3, *t.shape, dtype=t.dtype)[1],
        lambda t: torch.empty(t.shape[0], 2 * t.shape[1], dtype=t.dtype)[:, ::2],
    ],
    ids=["plain", "transposed", "inside another", "every other column"],
)
def test_tensors_of_any_layout_are_saved_and_restored_in_place(
    store: Store, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    # Rows that are shorter and longer than a chunk, which chunks do not begin with.
    shapes = {"tall": (70_001, 47), "flat": (2, 2_500_000), "none": (0, 3)}
    torch.manual_seed(0)
    state = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    placed = {name: layout(tensor).copy_(tensor) for name, tensor in state.items()}
    ckpt = store.save(placed)
    assert same_bits(store.load(ckpt), state)
    target = {name: layout(tensor.clone()).fill_(0) for name, tensor in state.items()}
    places = {name: tensor.data_ptr() for name, tensor in target.items()}
    store.load_into(target, ckpt)
    assert same_bits(target, state)
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == places


def test_lazily_conjugated_tensors_are_saved_and_restored(store: Store) -> None:
    torch.manual_seed(0)
    state = {"c": torch.randn(5, 3, dtype=torch.complex64).conj()}
    ckpt, target = store.save(state), {"c": torch.zeros(5, 3, dtype=torch.complex64).conj()}
    store.load_into(target, ckpt)
    assert torch.equal(target["c"], state["c"])
    assert torch.equal(store.load(ckpt)["c"], state["c"])


def test_a_tied_module_is_not_restored_from_weights_that_differ(store: Store) -> None:
    ckpt = store.save(Tied(1, tied=False))
    target = Tied(2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(MismatchError, match="share memory"):
        store.load_into(target, ckpt)
    assert same_bits(dict(target.state_dict()), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "the checkpoint lacks weight"),
        (lambda s: s.update(more=torch.zeros(1)), "the target lacks more"),
        (lambda s: s.update(weight=torch.zeros(3, 2)), r"weight is \(2, 3\).*\(3, 2\)"),
        (lambda s: s.update(weight=torch.zeros(2, 3).double()), "float32.*float64"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_mismatch_is_named_and_the_module_stays_unchanged(
    store: Store, change: object, message: str
) -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    change(state)  # type: ignore[operator]
    module = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(MismatchError, match=message):
        store.load_into(module, store.save(state))
    assert same_bits(dict(module.state_dict()), before)


def test_a_module_without_memory_is_not_restored(store: Store) -> None:
    ckpt = store.save(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(MismatchError, match="meta"):
        store.load_into(module, ckpt)


class Sharded(torch.Tensor):
    placements = ("Shard(0)",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "'x' is a list"),
        (1.0, "'x' is a float"),
        (torch.empty(2, device="meta"), "no plain memory"),
        (torch.eye(3).to_sparse(), "no plain memory"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "no plain memory"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(2).as_subclass(Sharded), "sharded"),
    ],
    ids=["list", "float", "meta", "sparse", "nested", "quantized", "sharded"],
)
@pytest.mark.filterwarnings("ignore")
def test_values_without_plain_memory_are_refused(store: Store, value: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        store.save({"x": value() if callable(value) else value})
    assert store.log() == []


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, 3, None])
def test_an_invalid_tensor_name_is_refused(store: Store, name: object) -> None:
    with pytest.raises(InvalidInputError, match="name of a tensor"):
        store.save({name: torch.ones(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": -1},
        {"step": 1.5},
        {"step": True},
        {"metrics": {"a": "high"}},
        {"metrics": {"a": 10**400}},
        {"metrics": {"a": torch.ones(2)}},
        {"metrics": {1: 0.5}},
        {"metrics": [("a", 1.0)]},
        {"tags": "best"},
        {"tags": [1]},
        {"metadata": {"a": object()}},
        {"metadata": {"a": float("nan")}},
        {"metadata": {1: "a"}},
        {"metadata": ["a"]},
        {"parent": 3},
        {"parent": SimpleNamespace(id="x")},
    ],
)
def test_arguments_that_cannot_be_kept_are_refused(
    store: Store, arguments: dict[str, object]
) -> None:
    with pytest.raises(InvalidInputError):
        store.save({"x": torch.ones(1)}, **arguments)  # type: ignore[arg-type]
    assert store.log() == []


@pytest.mark.parametrize("tensors", [None, [torch.ones(1)], "path"])
def test_only_mappings_and_modules_are_saved(store: Store, tensors: object) -> None:
    with pytest.raises(InvalidInputError, match="mapping"):
        store.save(tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "error"), [("cuda:77", StorageError), ("nonsense", InvalidInputError)]
)
def test_a_missing_device_raises_a_store_error(
    store: Store, device: str, error: type[StoreError]
) -> None:
    with pytest.raises(error, match=device):
        store.load(store.save({"x": torch.ones(1)}), device=device)


@pytest.mark.parametrize("wrong", [3, None, 1.5, ["a"]])
def test_an_invalid_checkpoint_name_raises_a_store_error(store: Store, wrong: object) -> None:
    for call in (store.load, store.get, store.forget, store.tensors, store.anchor, store.base):
        with pytest.raises(StoreError):
            call(wrong)  # type: ignore[operator]


def test_tensors_that_share_some_memory_are_restored(tmp_path: Path, store: Store) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(1000, 1000, generator=generator).bfloat16()

    def views(tensor: torch.Tensor) -> State:
        return {"whole": tensor, "most": tensor[:900], "rest": tensor[100:], "turned": tensor.t()}

    apart = {name: tensor.contiguous().clone() for name, tensor in views(whole).items()}
    base = store.add_base(write_base(tmp_path / "views.safetensors", apart))
    moved = train_step({"whole": whole}, 0.3, 1)["whole"]
    ckpt = store.save(views(moved), parent=base)
    for _ in range(5):
        target = torch.zeros_like(moved)
        store.load_into(views(target), ckpt)
        assert bits_of(target) == bits_of(moved)


def test_a_target_that_cannot_hold_the_content_is_refused(store: Store) -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    ckpt = store.save({"rows": rows, "more": rows + 1})
    target = {"rows": torch.zeros(1, 4).expand(3, 4), "more": torch.zeros(3, 4)}
    with pytest.raises(MismatchError, match="rows is expanded"):
        store.load_into(target, ckpt)
    assert not target["more"].any()
    memory = torch.zeros(16)
    for rest in (memory[2:14].view(3, 4), torch.zeros(3, 4)):
        sharing = {"rows": memory.as_strided((3, 4), (2, 1)), "more": rest}
        with pytest.raises(MismatchError, match="shares memory"):
            store.load_into(sharing, ckpt)
    halves = {"rows": memory[:12].view(3, 4), "more": memory[2:14].view(3, 4)}
    with pytest.raises(MismatchError, match="shares memory"):
        store.load_into(halves, ckpt)


def test_overlapping_targets_accept_equal_values_in_the_overlap(store: Store) -> None:
    memory = torch.arange(8.0)
    windows = {"windows": memory.as_strided((3, 4), (2, 1)), "tail": memory[4:]}
    ckpt = store.save(windows)
    target = torch.zeros(8)
    store.load_into({"windows": target.as_strided((3, 4), (2, 1)), "tail": target[4:]}, ckpt)
    assert torch.equal(target, memory)
