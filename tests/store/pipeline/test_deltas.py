"""A checkpoint costs what changed, and depends on nothing that it should not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from msft_store import Base, Box, Checkpoint, InvalidInputError, KeepLast, Parts, Store
from msft_store.codec.codecs import DELTA
from msft_store.format.dtypes import dtype_by_name
from msft_store.format.layout import CHUNK_BYTES, BaseSpan, ChunkSpan, Record, chunk_key
from msft_store.objects.base_reader import BaseReader, box_runs
from msft_store.objects.chunks import ChunkStore
from msft_store.objects.manifest import (
    CheckpointFacts,
    Piece,
    TensorEntry,
    checkpoint_content,
    tensor_table,
    write_manifest,
)
from msft_store.objects.packs import PackWriter
from msft_store.pipeline import encode
from msft_store.storage.backend import LocalBackend
from msft_store.tensors.bytes import to_bytes
from tests.support.states import State, logical_bytes, make_state, same_bits, train_step, write_base

BF16 = dtype_by_name("bfloat16")


def packs(store: Store) -> list[Path]:
    return sorted(Path(store.path, "packs").glob("*.pack"))


def records(store: Store) -> list[Record]:
    objects = ChunkStore(LocalBackend(Path(store.path)))
    objects.refresh()
    return [record for pack in objects.packs.values() for record in pack]


def depths_of(store: Store, ckpt: Checkpoint) -> list[int]:
    objects = ChunkStore(LocalBackend(Path(store.path)))
    objects.refresh()
    keys = {k for entry in store.tensors(ckpt).values() for p in entry.pieces for k in p.keys}
    found = [objects.find(key, ckpt.base) for key in keys]
    return [stored.record.depth for stored in found if stored is not None]


def test_an_unchanged_model_costs_no_pack_at_all(store: Store, base: Base, state: State) -> None:
    ckpt = store.save(state, parent=base)
    assert (packs(store), ckpt.stored_bytes) == ([], 0)
    assert ckpt.logical_bytes == logical_bytes(state)
    assert same_bits(store.load(ckpt), state)


def test_only_the_changed_tensor_is_stored(store: Store, base: Base, state: State) -> None:
    changed = {**state, "model.scale": torch.tensor(0.75, dtype=torch.bfloat16)}
    store.save(changed, parent=base)
    assert [record.size for record in records(store)] == [2]


def test_equal_tensors_are_stored_once(store: Store) -> None:
    weight = torch.rand(64, 64)
    first = store.save({"a": weight, "b": weight.clone(), "c": weight})
    assert len(records(store)) == 1
    second = store.save({"elsewhere": weight}, parent=first)
    assert len(packs(store)) == 1
    assert second.stored_bytes == first.stored_bytes
    assert store.stats().shared_chunks == 1


def test_small_changes_cost_a_few_percent(store: Store, base: Base, state: State) -> None:
    ckpt = store.save(train_step(state, 0.03, 1), parent=base)
    assert 0 < ckpt.stored_bytes < 0.06 * ckpt.logical_bytes
    assert ckpt.unreferenced_bytes == 0
    assert store.stats().stored_bytes == ckpt.stored_bytes


def test_a_long_chain_never_goes_deeper_than_five(store: Store, base: Base, state: State) -> None:
    chain: list[tuple[Checkpoint, State]] = []
    parent: Base | Checkpoint = base
    for step in range(30):
        state = train_step(state, 0.02, step)
        ckpt = store.save(state, parent=parent, step=step)
        chain.append((ckpt, state))
        parent = ckpt
    depths = [max(depths_of(store, ckpt)) for ckpt, _ in chain]
    assert depths[:7] == [1, 2, 3, 2, 3, 4, 5]
    assert max(depths) == 5
    for ckpt, expected in chain[::5]:
        assert same_bits(store.load(ckpt), expected)
    store.plan_gc(KeepLast(1)).execute()
    assert same_bits(store.load(chain[-1][0]), state)
    assert store.check() == []


def test_a_chain_without_a_base_never_goes_deeper_than_five(store: Store, state: State) -> None:
    parent = None
    for step in range(8):
        state = train_step(state, 0.02, step)
        parent = store.save(state, parent=parent, step=step)
    assert parent is not None
    assert max(record.depth for record in records(store)) == 5
    assert parent.stored_bytes < 0.3 * parent.logical_bytes
    assert same_bits(store.load(parent), state)


def test_rounding_to_the_dtype_that_is_saved_makes_a_base_equal(
    tmp_path: Path, store: Store
) -> None:
    masters = make_state(dtype=torch.float32)
    base = store.add_base(write_base(tmp_path / "fp32.safetensors", masters))
    rounded = {name: tensor.bfloat16() for name, tensor in masters.items()}
    ckpt = store.save(rounded, parent=base)
    assert (ckpt.stored_bytes, ckpt.unreferenced_bytes) == (0, 0)
    assert {record.codec for record in records(store)} == {3}
    assert same_bits(store.load(ckpt), rounded)


def test_a_narrower_base_still_helps_wider_weights(tmp_path: Path, store: Store) -> None:
    narrow = make_state()
    base = store.add_base(write_base(tmp_path / "bf16.safetensors", narrow))
    masters = {name: tensor.float() for name, tensor in narrow.items()}
    same = store.save(masters, parent=base)
    assert (same.stored_bytes, same.unreferenced_bytes) == (0, 0)
    moved = train_step(masters, 0.05, 1)
    ckpt = store.save(moved, parent=base)
    assert ckpt.stored_bytes < 0.1 * ckpt.logical_bytes
    assert same_bits(store.load(ckpt), moved)


def test_a_base_with_nan_and_infinity_serves_in_another_dtype(tmp_path: Path, store: Store) -> None:
    weight = torch.randn(70_001)
    weight[::97], weight[1::89], weight[2::83] = float("nan"), float("inf"), 3e38
    base = store.add_base(write_base(tmp_path / "odd.safetensors", {"w": weight}))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        state = {"w": weight.to(dtype)}
        assert same_bits(store.load(store.save(state, parent=base)), state)


def test_the_conversion_of_nan_does_not_depend_on_its_offset(tmp_path: Path, store: Store) -> None:
    weight = torch.full((1001,), float("nan"))
    base = store.add_base(write_base(tmp_path / "nan.safetensors", {"w": weight}))
    reader = BaseReader(LocalBackend(Path(store.path)), base)
    whole = reader.read_span(BaseSpan(tensor="w", start=0), 1001, BF16)
    parts = [reader.read_span(BaseSpan(tensor="w", start=i), 1, BF16) for i in range(0, 1001, 7)]
    assert {part.tobytes() for part in parts} == {whole[:2].tobytes()} == {bytes(2)}


def test_integers_have_no_reference_to_floats_of_the_same_name(
    tmp_path: Path, store: Store
) -> None:
    base = store.add_base(write_base(tmp_path / "b.safetensors", {"w": torch.ones(100)}))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        state = {"w": torch.ones(100, dtype=dtype)}
        ckpt = store.save(state, parent=base)
        assert ckpt.unreferenced_bytes == ckpt.logical_bytes
        assert same_bits(store.load(ckpt), state)


@pytest.mark.parametrize("prefix", ["model.", "module.", "base_model.model."])
@pytest.mark.parametrize("on_base", [True, False], ids=["base", "checkpoint"])
def test_a_name_prefix_on_either_side_is_seen_through(
    tmp_path: Path, store: Store, prefix: str, on_base: bool
) -> None:
    plain = make_state()
    longer = {prefix + name: tensor for name, tensor in plain.items()}
    there, here = (longer, plain) if on_base else (plain, longer)
    base = store.add_base(write_base(tmp_path / "b.safetensors", there))
    moved = train_step(here, 0.03, 1)
    ckpt = store.save(moved, parent=base)
    # The tied name is in the file once, and found where its content is known.
    assert ckpt.unreferenced_bytes == 0
    assert ckpt.stored_bytes < 0.06 * ckpt.logical_bytes
    assert same_bits(store.load(ckpt), moved)


def test_bytes_without_a_reference_are_reported(store: Store, base: Base, state: State) -> None:
    head = torch.rand(40, 40)
    ckpt = store.save({**state, "new.head": head}, parent=base)
    assert ckpt.unreferenced_bytes == head.nbytes
    again = store.save({**state, "new.head": train_step({"h": head}, 0.1, 1)["h"]}, parent=ckpt)
    assert again.unreferenced_bytes == 0


def test_nothing_is_shared_across_bases(tmp_path: Path, store: Store) -> None:
    one, other = make_state(1), make_state(2)
    files = [write_base(tmp_path / f"{i}.safetensors", s) for i, s in enumerate((one, other))]
    bases = [store.add_base(file) for file in files]
    target = train_step(one, 0.05, 3)
    first = store.save(target, parent=bases[0])
    second = store.save(target, parent=bases[1])
    assert first.id != second.id
    assert second.stored_bytes > 5 * first.stored_bytes
    store.forget(first)
    store.plan_gc().execute()
    files[0].unlink()
    assert same_bits(Store.open(store.path).load(second), target)
    assert [finding.where[:4] for finding in store.check()] == ["base"]


def test_a_parents_base_is_the_base(store: Store, base: Base, state: State) -> None:
    first = store.save(train_step(state, 0.1, 1), parent=base)
    second = store.save(state, parent=first.id[:8])
    assert (first.base, first.parent) == (base.id, base.id)
    assert (second.base, second.parent) == (base.id, first.id)


def test_saving_the_same_again_is_the_same_checkpoint(
    store: Store, base: Base, state: State
) -> None:
    moved = train_step(state, 0.1, 1)
    first = store.save(moved, parent=base, step=4, metrics={"a": 0.5})
    before = store.stats()
    assert store.save(moved, parent=base, step=4, metrics={"a": 0.5}) == first
    assert store.stats() == before
    assert store.save(moved, parent=base, step=5, metrics={"a": 0.5}).id != first.id


def test_the_id_comes_from_content_not_from_encodings(tmp_path: Path, state: State) -> None:
    file = write_base(tmp_path / "b.safetensors", state)
    middle, last = train_step(state, 0.05, 1), train_step(state, 0.1, 2)
    ids = set()
    for name in ("direct", "through"):
        store = Store.create(tmp_path / name)
        base = store.add_base(file)
        if name == "through":
            # The same content is there already, as a change of something else.
            store.save(last, parent=store.save(middle, parent=base))
        ids.add(store.save(last, parent=base).id)
    assert len(ids) == 1


def test_an_anchor_keeps_its_id_and_needs_only_the_base(
    store: Store, base: Base, state: State
) -> None:
    first = store.save(train_step(state, 0.2, 1), parent=base)
    moved = train_step(store.load(first), 0.02, 2)
    second = store.save(moved, parent=first)
    assert max(depths_of(store, second)) == 2
    anchor = store.anchor(second)
    assert anchor.id == second.id
    assert max(depths_of(store, anchor)) == 1
    store.forget(first)
    plan = store.plan_gc()
    assert plan.held_bytes == 0
    plan.execute()
    again = Store.open(store.path)
    assert same_bits(again.load(second.id), moved)
    assert again.get(second.id).stored_bytes == anchor.stored_bytes == again.stats().stored_bytes
    assert again.check() == []


def test_a_rebase_frees_the_old_reference_of_a_checkpoint(
    store: Store, base: Base, state: State
) -> None:
    old_root_state = train_step(state, 0.3, 1)
    old_root = store.save(old_root_state, parent=base)
    best_state = train_step(old_root_state, 0.02, 2)
    best = store.save(best_state, parent=old_root)
    root_state = train_step(old_root_state, 0.02, 3)
    root = store.anchor(store.save(root_state, parent=old_root))
    store.forget(old_root)
    store.plan_gc().execute()
    before = store.stats()
    assert before.held_bytes > 0
    again = store.rebase(best, root)
    assert again.id == best.id
    store.plan_gc().execute()
    after = Store.open(store.path).stats()
    assert after.held_bytes == 0
    assert after.stored_bytes < before.stored_bytes
    assert max(depths_of(store, again)) == 2
    opened = Store.open(store.path)
    assert same_bits(opened.load(best.id), best_state)
    assert same_bits(opened.load(root.id), root_state)
    assert opened.check() == []


def test_a_rebase_that_frees_nothing_is_none(store: Store, base: Base, state: State) -> None:
    parent = store.save(train_step(state, 0.3, 1), parent=base)
    child = store.save(train_step(store.load(parent), 0.02, 2), parent=parent)
    other = store.save(train_step(state, 0.3, 3), parent=base)
    packs = set(Path(store.path, "packs").iterdir())
    assert store.rebase(child, other) == child
    assert store.rebase(child, child) == child
    assert store.rebase(child, parent) == child
    assert set(Path(store.path, "packs").iterdir()) == packs


def test_a_rebase_onto_a_checkpoint_of_another_base_is_refused(
    store: Store, base: Base, state: State
) -> None:
    ckpt, alone = store.save(train_step(state, 0.1, 1), parent=base), store.save(state)
    with pytest.raises(InvalidInputError, match="different bases"):
        store.rebase(ckpt, alone)


def test_a_chunk_may_be_rebased_again_and_again(store: Store, base: Base, state: State) -> None:
    best_state = train_step(train_step(state, 0.3, 1), 0.02, 2)
    root = store.save(train_step(state, 0.3, 1), parent=base)
    best = store.save(best_state, parent=root)
    for seed in range(3, 7):
        later = store.anchor(store.save(train_step(store.load(root), 0.02, seed), parent=root))
        store.forget(root)
        store.rebase(best, later)
        store.plan_gc().execute()
        assert store.stats().held_bytes == 0
        root = later
    opened = Store.open(store.path)
    assert same_bits(opened.load(best.id), best_state)
    assert opened.check() == []


def test_a_rebase_that_no_reader_would_follow_writes_nothing(
    store: Store, base: Base, state: State
) -> None:
    for parent in (base, None):
        root = store.save(train_step(state, 0.3, 1), parent=parent, step=1)
        child_state = train_step(store.load(root), 0.02, 2)
        child = store.save(child_state, parent=root, step=1)
        unlike = store.save(make_state(5), parent=parent, step=1)
        deep = store.save(train_step(make_state(5), 0.02, 3), parent=unlike, step=1)
        store.forget(root)
        before = packs(store)
        assert store.rebase(child, child) == child
        if parent is None:
            assert store.rebase(child, deep) == child
        assert packs(store) == before
        assert same_bits(store.load(child), child_state)


def test_after_the_last_generation_a_chunk_may_still_be_an_anchor(
    store: Store, base: Base, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MAX_GENERATION", 1)
    root = store.save(train_step(state, 0.3, 1), parent=base)
    best_state = train_step(store.load(root), 0.02, 2)
    best = store.save(best_state, parent=root)
    for seed in (3, 4):
        later = store.anchor(store.save(train_step(store.load(root), 0.02, seed), parent=root))
        store.forget(root)
        store.rebase(best, later)
        store.plan_gc().execute()
        root = later
    assert max(record.generation for record in records(store)) == 1
    assert store.stats().held_bytes > 0
    store.anchor(best)
    store.plan_gc().execute()
    assert max(depths_of(store, best)) == 1
    assert store.stats().held_bytes == 0
    assert same_bits(store.load(best), best_state)


def test_an_anchor_without_a_base_needs_no_other_checkpoint(store: Store, state: State) -> None:
    first = store.save(state)
    moved = train_step(state, 0.02, 1)
    second = store.save(moved, parent=first)
    store.anchor(second)
    store.forget(first)
    plan = store.plan_gc()
    assert plan.held_bytes == 0
    plan.execute()
    assert same_bits(store.load(second), moved)


def test_the_number_of_threads_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(big=True)
    file = write_base(tmp_path / "b.safetensors", state)
    in_order: Callable[..., object] = encode.in_order
    contents = []
    for workers in (1, 8):
        monkeypatch.setattr(
            encode, "in_order", lambda f, items, n=workers: in_order(f, items, workers=n)
        )
        store = Store.create(tmp_path / str(workers))
        first = store.save(train_step(state, 0.01, 1), parent=store.add_base(file))
        store.anchor(store.save(train_step(state, 0.3, 2), parent=first))
        contents.append({path.name: path.read_bytes() for path in packs(store)})
    assert contents[0] == contents[1]


def test_results_come_in_order_and_errors_come_out() -> None:
    def shout(n: int) -> int:
        if n == 7:
            raise ValueError(n)
        return 2 * n

    assert list(encode.in_order(shout, iter(range(7)), workers=3)) == [0, 2, 4, 6, 8, 10, 12]
    with pytest.raises(ValueError, match="7"):
        list(encode.in_order(shout, iter(range(50)), workers=3))


def test_a_tensor_of_several_pieces_is_put_together(store: Store) -> None:
    whole = torch.randn(6, 10)
    boxes = [((0, 0), (6, 4)), ((0, 4), (2, 6)), ((2, 4), (4, 6))]
    backend, pieces = LocalBackend(Path(store.path)), []
    dtype = dtype_by_name("float32")
    with backend.writer() as writer:
        pack = PackWriter(writer, store.version)
        for offset, shape in boxes:
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            data = to_bytes(whole[box]).tobytes()
            key = chunk_key(data, dtype)
            record = Record(
                key=key, offset=pack.position, length=len(data), size=len(data), codec=0, dtype=18,
                depth=0, base=None,
            )  # fmt: skip
            pack.append(record, data)
            pieces.append(Piece(offset=offset, shape=shape, keys=(key,)))
        pack.finalize()
    line = tensor_table({"w": TensorEntry(dtype=dtype, shape=(6, 10), pieces=tuple(pieces))})
    content = checkpoint_content(
        CheckpointFacts.of(), parent=None, base=None, tensors=line, logical_bytes=240
    )
    ckpt = write_manifest(
        backend, content, line, created=1, stored_bytes=240, unreferenced_bytes=240
    )
    assert same_bits(store.load(ckpt.id), {"w": whole})
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(10, 6).t())
    store.load_into(module, ckpt)
    assert torch.equal(module.w, whole)
    assert store.check() == []


def test_boxes_that_change_with_every_save_stay_readable(store: Store, tmp_path: Path) -> None:
    state = {"w": (torch.randn(12, 8, generator=torch.Generator().manual_seed(0))).bfloat16()}
    parent: Base | Checkpoint = store.add_base(write_base(tmp_path / "b.safetensors", state))
    saved = []
    for step in range(20):
        state = train_step(state, 0.2, step)
        cuts = [0, *sorted({1 + step % 5, 6 + step % 4}), 12]
        boxes = [
            Box(name="w", shape=(12, 8), offset=(begin, 0), tensor=state["w"][begin:end])
            for begin, end in itertools.pairwise(cuts)
        ]
        part = store.encode(boxes, parent=parent)
        parent = store.save(Parts([part]), parent=parent, step=step)
        saved.append((parent, state))
    again = Store.open(store.path)
    assert again.check() == []
    for ckpt, expected in saved:
        assert same_bits(again.load(ckpt), expected)


def test_references_by_box_and_by_parts_of_chunks_decode(tmp_path: Path, store: Store) -> None:
    old = torch.randn(8, 12).bfloat16()
    base = store.add_base(write_base(tmp_path / "b.safetensors", {"w": old}))
    plain = store.save({"p": torch.arange(50, dtype=torch.bfloat16)})
    plain_key = store.tensors(plain)["p"].pieces[0].keys[0]
    boxed = to_bytes(old[2:5, 3:7]).reshape(-1)[4:-2]
    spans = (
        ChunkSpan(key=plain_key, start=6, length=10),
        ChunkSpan(key=plain_key, start=30, length=14),
    )
    values = to_bytes(torch.arange(50, dtype=torch.bfloat16))
    joined = np.concatenate([values[6:16], values[30:44]])
    box = BaseSpan(tensor="w", start=2, box=((2, 3), (3, 4)))
    backend, keys = LocalBackend(Path(store.path)), []
    with backend.writer() as writer:
        pack = PackWriter(writer, store.version)
        for reference, span, base_id in ((boxed, box, base.id), (joined, spans, None)):
            chunk = reference.copy()
            chunk[::4] ^= 1
            payload = DELTA.encode(chunk, reference, BF16)
            record = Record(
                key=chunk_key(chunk.data, BF16), offset=pack.position, length=len(payload),
                size=chunk.size, codec=DELTA.code, dtype=BF16.code, depth=1, base=base_id,
                ref_key=chunk_key(reference.data, BF16), reference=span,
            )  # fmt: skip
            pack.append(record, payload)
            keys.append((record.key, chunk))
        pack.finalize()
    objects = ChunkStore(backend)
    objects.refresh()
    for key, chunk in keys:
        assert objects.read(key, chunk.size, BF16, base.id).tobytes() == chunk.tobytes()


@pytest.mark.parametrize("start", [0, 1, 5, 17])
def test_runs_of_a_box_are_its_elements_in_order(start: int) -> None:
    tensor = torch.arange(4 * 5 * 6).reshape(4, 5, 6)
    for offset, shape in [((0, 0, 0), (4, 5, 6)), ((1, 0, 0), (2, 5, 6)), ((1, 2, 3), (3, 2, 3))]:
        box = tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        runs = list(box_runs((4, 5, 6), offset, shape, start, 13))
        got = [position + i for position, length in runs for i in range(length)]
        assert got == box.reshape(-1)[start : start + 13].tolist()


def test_a_chunk_border_inside_a_base_of_another_dtype(tmp_path: Path, store: Store) -> None:
    count = CHUNK_BYTES // 4 + 1000
    weight = torch.randn(count)
    base = store.add_base(write_base(tmp_path / "b.safetensors", {"w": weight}))
    state = {"w": weight.double()}
    ckpt = store.save(state, parent=base)
    assert ckpt.stored_bytes == 0
    assert same_bits(store.load(ckpt), state)
