"""References into views of a base: reading, verification, and every operation on a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msft_store import BaseError, Box, KeepLast, Parts, Store
from msft_store.format.dtypes import dtype_by_name
from msft_store.format.layout import CHUNK_BYTES, ViewSpan
from msft_store.format.mapping import View, ViewPart
from msft_store.integrations.remote import push
from msft_store.objects.base_reader import BaseReader
from tests.support.states import State, same_bits
from tests.support.views import shown

BF16, F32 = dtype_by_name("bfloat16"), dtype_by_name("float32")
TENSORS = {
    "a": torch.arange(6 * 10, dtype=torch.float32).reshape(6, 10),
    "b": torch.arange(100, 100 + 10 * 6, dtype=torch.float32).reshape(10, 6),
    "c": torch.arange(200, 212, dtype=torch.float32),
}
VIEW = View(
    (3, 7, 10),
    (
        ViewPart(tensor="a", offset=(0, 1, 0), shape=(1, 6, 10), start=(0, 0)),
        ViewPart(tensor="b", offset=(1, 0, 2), shape=(1, 5, 8), start=(1, 0), axes=(1, 0)),
        ViewPart(tensor="a", offset=(2, 0, 0), shape=(1, 3, 10), start=(0, 1, 0), axes=(1, 0, 2),
                 view=(3, 2, 10)),
        ViewPart(tensor="c", offset=(2, 6, 1), shape=(1, 1, 9), start=(3,)),
    ),
)  # fmt: skip


def reader_of(store: Store, tensors: State, path: Path) -> BaseReader:
    save_file(dict(tensors), path)
    return store._catalog.objects.base(store.add_base(path).id)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_range_of_any_box_is_read(tmp_path: Path, data: st.DataObject) -> None:
    where = tmp_path / "store"
    store = Store.open(where) if where.exists() else Store.create(where)
    reader = (
        store._catalog.objects.base(store.bases()[0].id)
        if store.bases()
        else reader_of(store, TENSORS, tmp_path / "base.safetensors")
    )
    whole = shown(VIEW, {name: tensor.numpy() for name, tensor in TENSORS.items()})
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in VIEW.shape)
    size = tuple(
        data.draw(st.integers(1, n - at)) for n, at in zip(VIEW.shape, offset, strict=True)
    )
    box = whole[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))].reshape(-1)
    start = data.draw(st.integers(0, box.size - 1))
    count = data.draw(st.integers(1, box.size - start))
    for dtype, verified in ((F32, True), (BF16, False)):
        out = np.empty(count * dtype.size, np.uint8)
        span = ViewSpan(view=VIEW, start=start, box=(offset, size))
        reader.read_view_into(span, out, dtype, verified=verified)
        want = torch.from_numpy(box[start : start + count].copy()).to(dtype.torch)
        assert torch.equal(torch.from_numpy(out).view(dtype.torch), want)


def big_base() -> State:
    torch.manual_seed(0)
    return {f"e.{at}.w": torch.randn(1536, 1024).bfloat16() * 0.02 for at in range(4)}


def changed(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.where(torch.rand(tensor.shape) < 0.02, tensor * 1.01, tensor)


@pytest.fixture
def turned(tmp_path: Path, store: Store) -> tuple[str, torch.Tensor]:
    """Return the id of a base, and a stack of its tensors, turned; a chunk has parts of two."""
    base = big_base()
    save_file(base, tmp_path / "base.safetensors")
    return store.add_base(tmp_path / "base.safetensors").id, torch.stack(
        [t.t() for t in base.values()]
    )


def test_chunks_across_parts_are_differences(
    store: Store, turned: tuple[str, torch.Tensor]
) -> None:
    base, stack = turned
    assert stack.nbytes > 2 * CHUNK_BYTES
    assert store.save({"w": stack}, parent=base).stored_bytes == 0
    new = changed(stack, 1)
    ckpt = store.save({"w": new}, parent=base)
    assert ckpt.stored_bytes < 0.02 * ckpt.logical_bytes
    assert same_bits(Store.open(store.path).load(ckpt), {"w": new})


def test_gc_anchors_pulls_and_checks_keep_what_views_need(
    tmp_path: Path, store: Store, turned: tuple[str, torch.Tensor]
) -> None:
    base, stack = turned
    states = [changed(stack, seed) for seed in range(3)]
    saved = [store.save({"w": state}, parent=base, step=at) for at, state in enumerate(states)]
    store.forget(saved[0])
    store.plan_gc(KeepLast(2)).execute()
    store.anchor(saved[2])
    other = Store.create(tmp_path / "other")
    push(store, other.path)
    for one in (store, Store.open(other.path)):
        assert one.check(read_data=True) == []
        assert same_bits(one.load(saved[2].id), {"w": states[2]})


def test_a_changed_base_is_an_error_and_never_wrong_weights(
    tmp_path: Path, store: Store, turned: tuple[str, torch.Tensor]
) -> None:
    base, stack = turned
    new = changed(stack, 1)
    ckpt = store.save({"w": new}, parent=base)
    path = tmp_path / "base.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    with pytest.raises(BaseError, match="changed since it was added"):
        Store.open(store.path).load(ckpt)
    # A save stores whole what the base no longer holds.
    again = Store.open(store.path).save({"w": new + 1}, parent=base)
    assert same_bits(Store.open(store.path).load(again), {"w": new + 1})


def test_boxes_by_rows_and_columns_are_differences(
    store: Store, turned: tuple[str, torch.Tensor]
) -> None:
    base, stack = turned
    new = changed(stack, 1)
    for axis in range(3):
        half = new.shape[axis] // 2
        boxes = []
        for at in range(2):
            part = new.narrow(axis, at * half, half)
            offset = tuple(half * at if n == axis else 0 for n in range(3))
            boxes.append([Box(name="w", shape=tuple(new.shape), offset=offset, tensor=part)])
        ckpt = store.save(Parts([store.encode(one, parent=base) for one in boxes]), parent=base)
        assert same_bits(store.load(ckpt), {"w": new})
        assert ckpt.stored_bytes < 0.02 * ckpt.logical_bytes, axis


def test_descendants_keep_the_counterparts_when_their_weights_have_moved_far(
    tmp_path: Path, store: Store
) -> None:
    base = big_base()
    save_file(base, tmp_path / "base.safetensors")
    names = {f"x.{at}.experts": tensor for at, tensor in enumerate(base.values())}
    first = store.save(names, parent=store.add_base(tmp_path / "base.safetensors"))
    far = {name: -tensor for name, tensor in names.items()}
    last = Store.open(store.path).save(far, parent=first)
    store.export(last.id, tmp_path / "out", layout="files")
    assert same_bits(
        load_file(tmp_path / "out" / "model.safetensors"), {n: -t for n, t in base.items()}
    )
    assert {one.name for one in store.diff(store.bases()[0], last.id)} == base.keys()
