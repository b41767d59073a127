"""An average of checkpoints is exact to the last bit, refuses other models, names its sources."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store import Base, Box, Checkpoint, InvalidInputError, MismatchError, Parts, Store
from msft_store.format.dtypes import DTYPES
from msft_store.pipeline import parallel
from tests.support.states import State, bits_of, make_state, same_bits, train_step

FLOATS = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
]
WEIGHTS = st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=4).filter(
    lambda weights: sum(weights) > 0.1
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.create(tmp_path_factory.mktemp("average") / "store")


def random_bits(dtype: torch.dtype, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return arbitrary bit patterns: NaN payloads, infinities, subnormals, both zeros."""
    high = 2 if dtype == torch.bool else 256
    size = (count * dtype.itemsize,)
    return torch.randint(0, high, size, generator=generator, dtype=torch.uint8).view(dtype)


def plain_mean(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Return the mean of whole tensors, by the rule that is documented."""
    dtype = tensors[0].dtype
    if dtype.is_complex:
        parts = [torch.view_as_real(tensor) for tensor in tensors]
        return torch.view_as_complex(plain_mean(parts, weights))
    wide = torch.float64 if dtype.itemsize > 2 else torch.float32
    used = [(t, w / math.fsum(weights)) for t, w in zip(tensors, weights, strict=True) if w]
    terms = [tensor.to(wide) * weight for tensor, weight in used]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    kept = used[-1][0].to(wide)
    equal = torch.stack([tensor.to(wide) == kept for tensor, _ in used]).all(0)
    return torch.where(equal, kept, total).to(dtype)


@given(dtype=st.sampled_from(FLOATS), weights=WEIGHTS, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_an_average_is_the_plain_weighted_mean(
    shared: Store, dtype: torch.dtype, weights: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = dtype if dtype.is_complex else torch.float64
    states = [
        {"w": torch.randn(33, dtype=kind, generator=generator).to(dtype).view(3, 11)}
        for _ in weights
    ]

    mean = shared.load(shared.average([shared.save(state) for state in states], weights))["w"]

    expected = plain_mean([state["w"] for state in states], weights)
    assert bits_of(mean) == bits_of(expected)


@given(weights=st.lists(st.floats(0.01, 9), min_size=2, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_mean_of_bf16_is_that_of_float64_rounded_once(
    shared: Store, weights: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(64, generator=generator).bfloat16() for _ in weights]

    mean = shared.load(shared.average([shared.save({"w": t}) for t in tensors], weights))["w"]

    pairs = zip(tensors, weights, strict=True)
    exact = sum(tensor.double() * weight for tensor, weight in pairs) / sum(weights)
    # Half a unit in the last place of bf16, and the rounding of float32 for cancelled sums.
    assert ((mean.double() - exact).abs() <= exact.abs() * 2**-8 + 2**-19).all()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@given(weights=WEIGHTS, seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_what_is_equal_everywhere_keeps_its_bits(
    shared: Store, weights: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtypes = [dtype.torch for dtype in DTYPES if dtype.torch is not None]
    state = {str(dtype): random_bits(dtype, 32, generator) for dtype in dtypes}
    # One element differs, so that the chunks do and the others are compared one by one.
    others = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in others.values():
        tensor.view(torch.uint8)[0] ^= 1
    sources = [shared.save(state if n % 2 else others) for n in range(len(weights))]

    mean = shared.load(shared.average(sources, weights))

    for name, tensor in state.items():
        assert bits_of(mean[name][1:]) == bits_of(tensor[1:]), name
    same = shared.average([sources[-1]] * len(weights), weights)
    assert same_bits(shared.load(same), shared.load(sources[-1]))


def test_infinities_and_nan_follow_ieee_754(store: Store) -> None:
    inf, nan = math.inf, math.nan
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        one = store.save({"w": torch.tensor([inf, inf, nan, -0.0, 1.0], dtype=dtype)})
        other = store.save({"w": torch.tensor([1.0, -inf, 1.0, -0.0, 3.0], dtype=dtype)})
        mean = store.load(store.average([one, other]))["w"]
        expected = torch.tensor([inf, nan, nan, -0.0, 2.0], dtype=dtype)
        assert bits_of(mean) == bits_of(expected)


def test_the_number_of_threads_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(big=True)
    sources = [store.save(train_step(state, 0.3, seed)) for seed in range(3)]
    found = []
    for workers, threads in ((1, 1), (3, 2)):
        monkeypatch.setattr(parallel.in_order, "__defaults__", (workers,))
        torch.set_num_threads(threads)
        found.append(store.average(sources, [0.5, 0.3, 0.2]))
    torch.set_num_threads(1)
    assert found[0].id == found[1].id


def test_the_average_of_a_run_is_a_small_child_that_names_its_sources(
    store: Store, base: Base, state: State
) -> None:
    states = [train_step(state, 0.05, seed) for seed in (1, 2)]
    sources = [store.save(one, parent=base, step=n) for n, one in enumerate(states)]

    mean = store.average(
        [sources[0].id[:8], sources[1]], [3, 1], step=7, tags=["mean"], metadata={"run": "a"}
    )

    assert mean.metadata == {
        "run": "a",
        "average": [
            {"checkpoint": sources[0].id, "weight": 0.75},
            {"checkpoint": sources[1].id, "weight": 0.25},
        ],
    }
    assert (mean.parent, mean.base, mean.step, mean.tags) == (sources[1].id, base.id, 7, ("mean",))
    assert mean.stored_bytes < 0.2 * mean.logical_bytes
    expected = {name: plain_mean([s[name] for s in states], [3.0, 1.0]) for name in state}
    assert same_bits(store.load(mean), expected)
    assert (
        store.average(sources, [0.75, 0.25], step=7, tags=["mean"], metadata={"run": "a"}) == mean
    )
    assert store.check() == []


def test_integers_and_files_are_those_of_the_last(store: Store) -> None:
    one = store.save({"n": torch.tensor([1, 5]), "w": torch.zeros(2)}, files={"a.json": b"{}"})
    other = store.save({"n": torch.tensor([3, 3]), "w": torch.ones(2)}, files={"a.json": b"[1]"})
    bare = store.save({"n": torch.tensor([2, 2]), "w": torch.ones(2)})
    mean = store.average([bare, one, other], [1, 2, 1])
    assert store.load(mean)["n"].tolist() == [3, 3]
    assert store.load(mean)["w"].tolist() == [0.5, 0.5]
    assert store.files(mean) == {"a.json": b"[1]"}
    assert store.files(store.average([one, bare])) == {}


def test_an_average_is_exported_as_its_last_checkpoint(store: Store) -> None:
    one = store.save({"model.w": torch.zeros(2)})
    other = store.save(
        {"model.w": torch.ones(2)}, metadata={"export": {"within": "model."}, "n": 1}
    )
    mean = store.average([one, other])
    assert mean.metadata["export"] == other.metadata["export"]
    assert "n" not in mean.metadata


def test_a_weight_of_zero_takes_a_checkpoint_out(store: Store) -> None:
    one = store.save({"w": torch.tensor([-0.0, 2.0]), "n": torch.tensor(1)})
    other = store.save({"w": torch.tensor([1.0, math.inf]), "n": torch.tensor(2)})
    mean = store.average([one, other], [1, 0])
    assert same_bits(store.load(mean), store.load(one))
    assert mean.parent == one.id


def test_checkpoints_in_other_pieces_or_of_other_bases_have_an_average(
    store: Store, base: Base, state: State
) -> None:
    tensors = [train_step(make_state(big=True), 0.5, seed) for seed in (1, 2)]
    one = store.save(tensors[0])
    boxes = []
    for name, tensor in tensors[1].items():
        shape, half = tuple(tensor.shape), (tensor.shape or (0,))[0] // 3
        cuts = ((0, tensor[:half]), (half, tensor[half:])) if half else ((0, tensor),)
        for at, part in cuts:
            offset = (at, *(0 for _ in shape[1:])) if shape else ()
            boxes.append(Box(name=name, shape=shape, offset=offset, tensor=part))
    other = store.save(Parts([store.encode(boxes, parent=base)]), parent=base)
    expected = {name: plain_mean([t[name] for t in tensors], [1.0, 1.0]) for name in state}

    assert same_bits(store.load(store.average([one, other])), expected)
    both = store.average([other, other])
    assert store.tensors(both) == store.tensors(other)
    assert store.check() == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.ones(2)}, "has no tensor 'v', which checkpoint"),
        ({"w": torch.ones(2), "v": torch.ones(1), "x": torch.ones(1)}, "has no tensor 'x'"),
        ({"w": torch.ones(3), "v": torch.ones(1)}, r"'w' is float32 \(2,\) in .* float32 \(3,\)"),
        ({"w": torch.ones(2).half(), "v": torch.ones(1)}, "'w' is float32 .* and float16"),
    ],
)
def test_other_models_are_refused(store: Store, other: State, message: str) -> None:
    one = store.save({"w": torch.ones(2), "v": torch.ones(1)})
    with pytest.raises(MismatchError, match=message):
        store.average([one, store.save(other)], [1, 0])
    assert len(store.log()) == 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2 checkpoints"),
        ([1, -1], "positive sum"),
        ([0, 0], "positive sum"),
        ([math.nan, 1], "finite"),
        ([math.inf, 1], "finite"),
        ([1e308, 1e308], "finite"),
        (["a", 1], "finite"),
        (3, "finite"),
    ],
)
def test_weights_that_are_no_weights_are_refused(
    store: Store, ckpt: Checkpoint, weights: list[float], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        store.average([ckpt, ckpt], weights)


def test_an_average_of_nothing_is_refused(store: Store, ckpt: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="at least one"):
        store.average([])
    with pytest.raises(InvalidInputError, match="a list"):
        store.average(ckpt.id)
