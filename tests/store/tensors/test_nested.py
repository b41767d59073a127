"""Nested state goes into a checkpoint and comes back equal."""

from __future__ import annotations

import io
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msft_store import InvalidInputError, MismatchError, Store, flatten, unflatten
from tests.support.states import bits_of

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.lists(st.integers(-9, 9), max_size=3).map(lambda n: torch.tensor(n, dtype=torch.int16))
)
KEYS = st.text(max_size=3) | st.integers(-3, 3) | st.sampled_from(["$tensor", "a.b", "a", "b"])
TREES = st.recursive(
    LEAVES,
    lambda below: (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(KEYS, below, max_size=3)
    ),
    max_leaves=8,
)


def plain(tree: Any) -> Any:
    """Return what is equal for equal trees only: types, orders and bits included."""
    if isinstance(tree, torch.Tensor):
        return "tensor", tree.dtype, tuple(tree.shape), bits_of(tree)
    if isinstance(tree, dict):
        return "dict", [(type(key), key, plain(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree), [plain(item) for item in tree]
    return type(tree), repr(tree)


def in_order(tree: Any) -> Any:
    """Return a tree as canonical JSON would give it: keys of mappings sorted."""
    if isinstance(tree, dict):
        return {key: in_order(tree[key]) for key in sorted(tree)}
    return [in_order(item) for item in tree] if isinstance(tree, list) else tree


@given(TREES)
def test_unflatten_reverses_flatten(tree: Any) -> None:
    tensors, rest = flatten(tree, "state")

    assert plain(unflatten(tensors, in_order(rest))) == plain(tree)


def test_an_optimizer_and_generators_go_through_a_checkpoint(store: Store) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.RandomState(3).get_state(),
        "loss": math.inf,
    }

    tensors, tree = flatten(state, "training")
    ckpt = store.save({**model.state_dict(), **tensors}, metadata={"training": tree})
    store = Store.open(store.path)
    found = unflatten(store.load(ckpt.id), store.get(ckpt.id).metadata["training"])

    array, expected = found["numpy"][1], state["numpy"][1]
    assert array.dtype == expected.dtype
    assert np.array_equal(array, expected)
    del found["numpy"], state["numpy"]
    assert plain(found) == plain(state)
    optimizer.load_state_dict(found["optimizer"])
    random.setstate(found["python"])


def test_paths_that_read_alike_get_names_of_their_own() -> None:
    tree = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}

    tensors, rest = flatten(tree)

    assert len(tensors) == 2
    assert plain(unflatten(tensors, rest)) == plain(tree)


def test_a_schedulers_counter_and_any_integer_come_back(store: Store) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2])
    huge = 10**4000
    _, tree = flatten({"scheduler": scheduler.state_dict(), "huge": huge, "less": -huge})

    ckpt = store.save({"w": torch.ones(1)}, metadata={"state": tree})
    found = unflatten({}, store.get(ckpt.id).metadata["state"])

    assert (found["huge"], found["less"]) == (huge, -huge)
    milestones = found["scheduler"]["milestones"]
    assert isinstance(milestones, Counter)
    assert milestones == scheduler.milestones


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        1j,
        {(1, 2): 3},
        {True: 1},
        pytest.param(10**5000, id="10**5000"),
        np.ma.masked_array([1.0, 2.0], [False, True]),
        np.arange(3, dtype=np.dtype("f8").newbyteorder()),
        np.array([1 + 1j]),
    ],
)
def test_values_that_json_cannot_represent_are_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidInputError, match=r"state\.deep"):
        flatten({"deep": value}, "state")


def test_endless_nesting_is_refused() -> None:
    tree: list[Any] = []
    tree.append(tree)

    with pytest.raises(InvalidInputError, match="levels deep"):
        flatten(tree, "state")


def test_a_missing_tensor_is_named() -> None:
    tensors, rest = flatten({"a": torch.ones(1)}, "state")
    tensors.clear()

    with pytest.raises(MismatchError, match=r"'state\.a'"):
        unflatten(tensors, rest)


@pytest.mark.parametrize("tree", [{"$else": 1}, {"$bytes": "x"}, {"$dict": 3}, {"$integer": "x"}])
def test_foreign_json_is_refused(tree: object) -> None:
    with pytest.raises(InvalidInputError, match="not a nested state"):
        unflatten({}, tree)


@pytest.mark.parametrize("position", [0, 2, 3, 9])
def test_a_bytes_io_comes_back_with_its_position(position: int) -> None:
    stream = io.BytesIO(b"abc")
    stream.seek(position)

    tensors, tree = flatten({"extra": (stream,)})
    (found,) = unflatten(tensors, tree)["extra"]

    assert tensors == {}
    assert (found.tell(), found.getvalue()) == (position, b"abc")
    stream.close()
    with pytest.raises(InvalidInputError, match="extra is a BytesIO"):
        flatten({"extra": stream})
    for content in (["zz", 0], ["", -1], ["", 1 << 70], "", [""]):
        with pytest.raises(InvalidInputError, match="flatten"):
            unflatten({}, {"$bytesio": content})
