"""The differences between two checkpoints, counted by bits."""

from __future__ import annotations

import pytest
import torch

from msft_store import Base, Box, Parts, Store, TensorDiff, UnknownCheckpointError
from msft_store.maintenance import diff as module
from tests.support.states import State, make_state, train_step


def by_name(diffs: list[TensorDiff]) -> dict[str, TensorDiff]:
    return {diff.name: diff for diff in diffs}


def expected(one: torch.Tensor, other: torch.Tensor) -> tuple[int, float | None]:
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    changed = one.view(bits) != other.view(bits)
    distance = (other.double() - one.double()).abs()[changed]
    finite = distance[distance.isfinite()]
    return int(changed.sum()), float(finite.max()) if finite.numel() else None


@pytest.mark.parametrize("big", [False, True])
def test_every_tensor_is_counted(store: Store, big: bool) -> None:
    state = make_state(big=big)
    trained = train_step(state, 0.05, 1)
    trained["model.layers.1.up.weight"] = state["model.layers.1.up.weight"]
    one, other = store.save(state), store.save(trained)

    found = by_name(store.diff(one, other))

    assert found.keys() == state.keys()
    for name, diff in found.items():
        assert (diff.changed, diff.largest) == expected(state[name], trained[name]), name
        assert diff.elements == state[name].numel()
        assert diff.kind == ("changed" if diff.changed else "equal")
    stored = {source.tensor: source.stored_bytes for source in store.sources(other)}
    assert {name: diff.stored_bytes for name, diff in found.items()} == stored


def test_bits_are_compared_not_numbers(store: Store) -> None:
    one = {"w": torch.tensor([0.0, float("nan"), 1.0, float("inf")])}
    other = {"w": torch.tensor([-0.0, float("nan"), 1.0, 3.0])}

    (diff,) = store.diff(store.save(one), store.save(other))

    assert (diff.changed, diff.largest) == (2, 0.0)
    assert diff.share == 0.5


def test_a_base_can_be_either_side(store: Store, base: Base, state: State) -> None:
    trained = train_step(state, 0.05, 1)
    ckpt = store.save(trained, parent=base)

    forth, back = by_name(store.diff(base, ckpt)), by_name(store.diff(ckpt.id, base.id[:8]))

    up = "model.layers.0.up.weight"
    assert forth[up].changed == back[up].changed == expected(state[up], trained[up])[0]
    # The base has a tied tensor under one of its names only.
    assert (forth["lm_head.weight"].kind, back["lm_head.weight"].kind) == ("added", "removed")
    with pytest.raises(UnknownCheckpointError):
        store.diff(ckpt, "nobody")


def test_names_under_a_prefix_are_those_of_the_base(store: Store, base: Base, state: State) -> None:
    trained = train_step(state, 0.05, 1)
    plain = store.save(trained, parent=base)
    moments = {"optimizer.layers.0.up": torch.ones(4)}
    nested = store.save(
        {f"model.{name}": tensor for name, tensor in trained.items()} | moments, parent=base
    )

    expected = by_name(store.diff(base, plain))
    found = by_name(store.diff(base, nested))
    assert found.pop("optimizer.layers.0.up").kind == "added"
    # What the base does not have keeps its name.
    assert found.pop("model.lm_head.weight").kind == expected.pop("lm_head.weight").kind == "added"
    assert found == expected
    back = by_name(store.diff(nested, base))
    assert back["model.layers.0.up.weight"].kind == "changed"
    assert back["optimizer.layers.0.up"].kind == "removed"


def test_a_diff_names_tensors_that_cannot_be_compared(store: Store) -> None:
    one = store.save({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)})
    other = store.save({"a": torch.ones(4), "b": torch.ones(2).half(), "c": torch.ones(1)})

    found = by_name(store.diff(one, other))

    assert [found[name].kind for name in "abc"] == ["other", "other", "equal"]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("dtype", "one", "other", "largest"),
    [
        (torch.bool, True, False, 1.0),
        (torch.uint8, 0, 255, 255.0),
        (torch.int64, 2**60, 2**60 + 1, 1.0),
        (torch.int64, -(2**63), 2**63 - 1, float(2**64)),
        (torch.uint64, 2**64 - 1, 2**64 - 3, 2.0),
        (torch.float8_e4m3fn, 2.0, -1.0, 3.0),
        (torch.float8_e5m2fnuz, 2.0, -1.0, 3.0),
        (torch.float8_e8m0fnu, 2.0, 8.0, 6.0),
        (torch.float16, 2.0, 2.5, 0.5),
        (torch.float64, 1.0, 1.0 + 2**-50, 2.0**-50),
        (torch.float64, float("inf"), float("-inf"), None),
        (torch.complex32, 1 + 1j, 4 + 5j, 5.0),
        (torch.complex64, 1 + 1j, 4 + 5j, 5.0),
        (torch.complex128, 1 + 1j, 1 + 2**-50 + 1j, 2.0**-50),
    ],
)
def test_the_largest_change_is_right_in_every_dtype(
    store: Store, dtype: torch.dtype, one: complex, other: complex, largest: float | None
) -> None:
    sides = [store.save({"w": torch.tensor([value, 1], dtype=dtype)}) for value in (one, other)]

    (diff,) = store.diff(*sides)

    assert (diff.changed, diff.largest) == (1, largest)


@pytest.mark.parametrize("slab_bytes", [1, 30, 1 << 20])
def test_other_pieces_are_compared_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, slab_bytes: int
) -> None:
    monkeypatch.setattr(module, "SLAB_BYTES", slab_bytes)
    one, other = torch.arange(12.0).reshape(4, 3), torch.arange(12.0).reshape(4, 3)
    other[2, 1] += 5
    other[0, 0] += 1
    whole = store.save({"w": one})
    halves = [
        Box(name="w", shape=(4, 3), offset=(2 * at, 0), tensor=other[2 * at : 2 * at + 2])
        for at in (0, 1)
    ]
    sides = [
        Box(name="w", shape=(4, 3), offset=(0, first), tensor=other[:, first:last])
        for first, last in ((0, 2), (2, 3))
    ]

    for boxes in (halves, sides):
        cut = store.save(Parts([store.encode(boxes)]))
        (diff,) = store.diff(whole, cut)

        assert (diff.changed, diff.largest) == (2, 5.0)
