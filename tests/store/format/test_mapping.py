"""Mappings between a checkpoint's tensors and a base's, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft_store.format.layout import canonical_json
from msft_store.format.mapping import BaseMapping, View, ViewPart

BASE = {"model.layers.0.w1": (8, 4), "model.layers.0.w2": (4, 8), "model.norm": (4,), "head": ()}
PART = ViewPart(tensor="model.layers.0.w1", offset=(1, 0, 0), shape=(1, 8, 4), start=(0, 0))
TURNED = ViewPart(
    tensor="model.layers.0.w2", offset=(0, 2, 0), shape=(1, 6, 4), start=(0, 2), axes=(1, 0)
)
VIEW = View((2, 8, 4), (PART, TURNED))

segments = st.lists(st.sampled_from(["a", "b", "model", "0", "1", "w"]), min_size=1, max_size=5)
tensor_names = segments.map(".".join)


def through_json(mapping: BaseMapping, base: dict[str, tuple[int, ...]]) -> BaseMapping:
    return BaseMapping.from_json(json.loads(canonical_json(mapping.to_json(base))), base)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(tensor_names, st.just((2,)), min_size=1, max_size=12),
    st.dictionaries(tensor_names, st.integers(0, 1000), max_size=12),
    st.sampled_from(["", "module.", "x.y."]),
)
def test_names_come_back_whatever_their_prefixes(
    base: dict[str, tuple[int, ...]], chosen: dict[str, int], prefix: str
) -> None:
    olds = sorted(base)
    names = {prefix + new: olds[at % len(olds)] for new, at in chosen.items()}
    names |= {prefix + old: old for old in olds if prefix}
    mapping = BaseMapping(names=names, views={})
    assert through_json(mapping, base) == mapping


def test_views_come_back_and_prefixes_keep_renames_small() -> None:
    base = {f"language_model.model.layers.{i}.w": (2, 2) for i in range(100)} | BASE
    names = {old.replace("language_model.model.", "model.text."): old for old in list(base)[:100]}
    mapping = BaseMapping(names=names, views={"experts": VIEW})
    assert through_json(mapping, base) == mapping
    assert len(mapping.to_json(base)["names"]) == 0
    assert mapping
    assert not BaseMapping(names={}, views={})


def test_a_view_finds_the_parts_of_a_box() -> None:
    assert VIEW.covered == 56
    assert VIEW.overlapping((0, 0, 0), (1, 3, 2)) == [(TURNED, (0, 2, 0), (1, 1, 2))]
    assert VIEW.overlapping((0, 0, 0), (1, 2, 4)) == []
    assert View((), (ViewPart(tensor="h", offset=(), shape=(), start=()),)).overlapping((), ())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_box_of_a_part_is_found_in_the_base(data: st.DataObject) -> None:
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    axes = tuple(draw(st.permutations(range(len(shape)))))
    base = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(draw(st.integers(1, n - at)) for n, at in zip(shape, start, strict=True))
    box = base[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].transpose(axes)
    lead = draw(st.integers(0, 2))
    shown = box.reshape((1,) * lead + box.shape)
    part = ViewPart(tensor="t", offset=(0,) * shown.ndim, shape=shown.shape, start=start, axes=axes)
    assert part.check(shape) == shape
    at = tuple(draw(st.integers(0, n - 1)) for n in shown.shape)
    inner = tuple(draw(st.integers(1, n - a)) for n, a in zip(shown.shape, at, strict=True))
    first, count = part.in_base(at, inner)
    got = base[tuple(slice(a, a + n) for a, n in zip(first, count, strict=True))]
    want = shown[tuple(slice(a, a + n) for a, n in zip(at, inner, strict=True))]
    assert np.array_equal(got.transpose(axes).reshape(want.shape), want)


def edited(**fields: Any) -> dict[str, Any]:
    part = {**PART.to_json(), **fields}
    return {"prefixes": [], "names": {}, "views": {"v": {"shape": [2, 8, 4], "parts": [part]}}}


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"prefixes": [["a"]], "names": {}, "views": {}},
        {"prefixes": [["a", "b"]] * 9, "names": {}, "views": {}},
        {"prefixes": [], "names": {"a": "missing"}, "views": {}},
        {"prefixes": [["x" * 5000, ""]], "names": {}, "views": {}},
        edited(tensor="missing"),
        edited(shape=[1, 8, 5]),
        edited(shape=[1, 0, 4]),
        edited(shape=[2, 8, 4]),
        edited(shape=[8, 4]),
        edited(offset=[1, 1, 0]),
        edited(start=[1, 0]),
        edited(start=[0]),
        edited(start=[-1, 0]),
        edited(axes=[0, 0]),
        edited(axes=[1, 0]),
        edited(view=[8, 5]),
        edited(view=[2, 4, 4]),
        {"prefixes": [], "names": {}, "views": {"v": {"shape": [1 << 40] * 3, "parts": []}}},
        {"prefixes": [], "names": {}, "views": {"v": {"shape": [1], "parts": {}}}},
        {
            "prefixes": [],
            "names": {},
            "views": {"v": {"shape": [2, 8, 4], "parts": [PART.to_json()] * 3}},
        },
    ],
)
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, KeyError)):
        BaseMapping.from_json(value, BASE)
