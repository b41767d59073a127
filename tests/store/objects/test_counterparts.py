"""Counterparts of a checkpoint's tensors in a base, found by names and by content."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from msft_store.objects.counterparts import match_names
from tests.support.views import Arrays, counterpart, find, shown

Array = NDArray[np.float32]
HEADS, WIDTH = 4, 32


def weights(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def moved(tensors: Arrays) -> dict[str, Array]:
    """Return tensors of which some elements changed a little."""
    chance = np.random.default_rng(0)
    return {
        name: np.where(chance.random(t.shape) < 0.1, t * np.float32(1.01), t)
        for name, t in tensors.items()
    }


UPS = [weights(10 + at, 48, WIDTH) for at in range(3)]
GATES = [weights(20 + at, 48, WIDTH) for at in range(3)]
DOWNS = [weights(30 + at, WIDTH, 48) for at in range(3)]
Q, K, V = weights(40, 64, WIDTH), weights(41, 16, WIDTH), weights(42, 16, WIDTH)
PAIR = [UPS[0], GATES[0]]
BIASES = [weights(50 + at, 48) for at in range(3)]


def numbered(name: str, tensors: list[Array]) -> dict[str, Array]:
    return {name.format(at): tensor for at, tensor in enumerate(tensors)}


PAIRS: dict[str, tuple[Arrays, Arrays]] = {
    "stacked": ({"e.down": np.stack(DOWNS)}, numbered("e.{}.w2", DOWNS)),
    "stacked and joined": (
        {"e.up": np.stack([np.concatenate(pair) for pair in zip(GATES, UPS, strict=True)])},
        {**numbered("e.{}.w1", GATES), **numbered("e.{}.w3", UPS)},
    ),
    "stacked and turned": (
        {"e.up": np.stack([up.T for up in UPS])},
        numbered("e.{}.w3", UPS),
    ),
    "stacked, turned and joined by columns": (
        {"e.up": np.stack([np.concatenate(p).T for p in zip(GATES, UPS, strict=True)])},
        {**numbered("e.{}.w1", GATES), **numbered("e.{}.w3", UPS)},
    ),
    "stacks joined": (
        {"e.up": np.concatenate([np.stack(GATES), np.stack(UPS)], axis=1)},
        {"e.gate": np.stack(GATES), "e.ups": np.stack(UPS)},
    ),
    "joined by rows": ({"qkv": np.concatenate([Q, K, V])}, {"q": Q, "k": K, "v": V}),
    "joined by columns": ({"x": np.concatenate([Q.T, K.T], axis=1)}, {"a": Q.T, "b": K.T}),
    "joined vectors": ({"b": np.concatenate(BIASES)}, numbered("b.{}", BIASES)),
    "stacked vectors": ({"b": np.stack(BIASES)}, numbered("b.{}", BIASES)),
    "turned": ({"w": Q.T}, {"v": Q}),
    "reshaped": ({"w": Q.reshape(64, 2, 4, 4)}, {"v": Q}),
    "resized": ({"w": np.concatenate([Q, V[:3]])}, {"w": Q}),
    "interleaved": (
        {"g": np.concatenate(PAIR[:1]), "x": np.stack(PAIR, axis=1).reshape(96, WIDTH)},
        {"g": PAIR[0], "layers.x": np.concatenate(PAIR)},
    ),
    "halves of heads permuted": (
        {
            "layers.0.q": Q.reshape(HEADS, 8, 2, WIDTH).swapaxes(1, 2).reshape(64, WIDTH),
            "layers.0.k": K,
            "layers.0.v": V,
        },
        {"layers.0.qkv": np.concatenate([Q, K, V])},
    ),
    "renamed": ({"w": Q, "x": K}, {"a": K, "b": Q}),
}


@pytest.mark.parametrize("way", [1, -1], ids=["forth", "back"])
@pytest.mark.parametrize("name", PAIRS)
def test_each_element_gets_its_counterpart(name: str, way: int) -> None:
    tensors, base = PAIRS[name][::way]
    changed = moved(tensors)
    mapping = find(changed, base)
    for one, tensor in tensors.items():
        found = counterpart(one, mapping, base)
        assert found is not None, one
        if name == "resized":
            rows = min(len(found), 64)
            assert np.array_equal(found[:rows], tensor[:rows])
        else:
            assert np.array_equal(found, tensor), one
    assert find(changed, base) == mapping


def test_layers_with_equal_shapes_are_told_apart_by_content() -> None:
    base = {f"text.layers.{at}.{n}": weights(at, 32, 32) for n in "ab" for at in range(4)}
    base |= {f"image.layers.{at}.{n}": weights(9 + at, 32, 32) for n in "cd" for at in range(4)}
    base = {name: weights(at, 32, 32) for at, name in enumerate(base)}
    tensors = {f"m.{n.replace('layers', 'blocks')}x": t for n, t in base.items()}
    mapping = find(moved(tensors), base)
    assert all(np.array_equal(base[mapping.names[n]], t) for n, t in tensors.items())


def test_constant_tensors_follow_their_names_and_layers() -> None:
    ones = np.ones(32, np.float32)
    base = {f"old.{at}.{n}.weight": ones for at in range(3) for n in ("norm1", "norm2")}
    base |= {f"old.{at}.up.weight": weights(at, 48, 32) for at in range(3)}
    tensors = {name.replace("old.", "new.layers."): t for name, t in base.items()}
    names = find(moved(tensors), base).names
    assert names == {name.replace("old.", "new.layers."): name for name in base}


def test_what_is_no_counterpart_is_not_taken() -> None:
    base = {"w": weights(1, 64, 32), "v": weights(2, 8, 32), "zeros": np.zeros((4, 32), np.float32)}
    other = {
        "a": weights(3, 64, 32),
        "b": weights(4, 12, 32),
        "none": np.zeros((0, 32), np.float32),
    }
    assert not find(other, base)
    # The names agree, so the content does not matter.
    assert not find({"w": weights(5, 64, 32)}, base)


def test_prefixes_are_exchanged_by_votes_and_strictly_only_added_or_removed() -> None:
    base = {f"language_model.model.layers.{at}.w": (4, 4) for at in range(3)}
    base |= {f"vision.layers.{at}.w": (4, 4) for at in range(2)}
    mine = {f"model.text.layers.{at}.w": (4, 4) for at in range(3)} | {
        "module.vision.layers.0.w": (4, 4)
    }
    found = match_names(mine, base, exchanged=True)
    assert found["model.text.layers.1.w"] == "language_model.model.layers.1.w"
    assert found["module.vision.layers.0.w"] == "vision.layers.0.w"
    assert match_names(mine, base) == {"module.vision.layers.0.w": "vision.layers.0.w"}


def test_elements_without_a_counterpart_are_zero_in_the_view() -> None:
    base = {"a": Q}
    mapping = find({"w": np.concatenate([Q, K])}, base)
    assert np.array_equal(shown(mapping.views["w"], base), np.concatenate([Q, 0 * K]))
