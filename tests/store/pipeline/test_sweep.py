"""A sweep goes from checkpoint to checkpoint by what differs, and believes no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msft_store import Base, Checkpoint, CorruptedError, KeepLast, MismatchError, Store, Timeline
from msft_store.codec import codecs
from msft_store.codec.undo import compare
from tests.support.pairs import BF16, DTYPES, KINDS, pair_of
from tests.support.states import State, make_state, same_bits, train_step, write_base

COUNT = 12
SIZES = (1, 7, 700, 20_000)


def commit_history(
    store: Store, base: Base | None, state: State, *, dense: float = 0.3
) -> list[tuple[Checkpoint, State]]:
    """Commit states of which one chunk never changes, another only at times."""
    saved: list[tuple[Checkpoint, State]] = []
    with Timeline(store, base, retention=KeepLast(COUNT)) as timeline:
        for step in range(COUNT):
            moved = train_step(state, dense if step % 5 == 4 else 0.02, step)
            moved["model.scale"] = state["model.scale"]
            if step % 3:
                moved["model.layers.0.up.weight"] = state["model.layers.0.up.weight"]
            state = moved
            saved.append((timeline.commit(state, step=step), state))
    return saved


def zeros(state: State) -> State:
    zero = {id(tensor): torch.zeros_like(tensor) for tensor in state.values()}
    return {name: zero[id(tensor)] for name, tensor in state.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_base", [True, False])
def test_every_checkpoint_is_exact_in_any_order(
    store: Store, base: Base, state: State, seed: int, with_base: bool
) -> None:
    saved = commit_history(store, base if with_base else None, state)
    generator = torch.Generator().manual_seed(seed)
    order = [saved[at % COUNT] for at in torch.randperm(2 * COUNT, generator=generator).tolist()]
    target = zeros(state)

    held = store.sweep(target, [checkpoint for checkpoint, _ in order])

    for checkpoint, expected in order:
        assert next(held) == checkpoint
        assert same_bits(target, expected)
    assert next(held, None) is None


def test_the_base_is_read_once(store: Store, base: Base, state: State, tmp_path: Path) -> None:
    saved = commit_history(store, base, state, dense=0.02)
    target = zeros(state)
    held = store.sweep(target, [checkpoint for checkpoint, _ in saved])
    next(held)
    (tmp_path / "base.safetensors").unlink()

    for (checkpoint, expected), now in zip(saved[1:], held, strict=True):
        assert now == checkpoint
        assert same_bits(target, expected)


@pytest.mark.parametrize("name", ["model.scale", "model.layers.0.up.weight", "lm_head.weight"])
def test_what_was_written_to_the_target_is_found(
    store: Store, base: Base, state: State, name: str
) -> None:
    saved = commit_history(store, base, state)
    target = zeros(state)

    held = store.sweep(target, [checkpoint for checkpoint, _ in saved])

    for _, expected in saved:
        next(held)
        assert same_bits(target, expected)
        # NumPy tells torch of no write.
        target[name].view(torch.int16).numpy()[...] ^= 1


def test_a_target_of_another_layout_is_swept(store: Store, base: Base, state: State) -> None:
    saved = commit_history(store, base, state)
    target = zeros(state)
    target["model.layers.1.up.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16).T

    for now, (checkpoint, expected) in zip(
        store.sweep(target, [checkpoint for checkpoint, _ in saved]), saved, strict=True
    ):
        assert now == checkpoint
        assert same_bits(target, expected)


def test_a_module_is_swept_and_gets_its_extra_state(store: Store) -> None:
    class Counting(torch.nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    model, saved = Counting(8, 8), []
    for model.count in range(3):
        torch.nn.init.constant_(model.weight, model.count)
        saved.append(store.save(model, parent=saved[-1] if saved else None))

    for now in store.sweep(model, reversed(saved)):
        assert model.count == saved.index(now)
        assert (model.weight == model.count).all()


def test_damage_is_reported_with_the_checkpoint_and_the_tensor(
    store: Store, base: Base, state: State
) -> None:
    saved = commit_history(store, base, state)
    held = store.sweep(zeros(state), [saved[0][0], saved[1][0]])
    next(held)
    for pack in Path(store.path).glob("packs/*"):
        data = bytearray(pack.read_bytes())
        data[16:200] = bytes(184)
        pack.write_bytes(data)

    with pytest.raises(CorruptedError, match=f"checkpoint {saved[1][0].id[:12]}, tensor '"):
        next(held)


def test_a_target_that_does_not_match_is_refused(store: Store, ckpt: Checkpoint) -> None:
    with pytest.raises(MismatchError):
        next(store.sweep({"other": torch.zeros(3)}, [ckpt]))


def test_chunks_of_another_base_or_size_are_read_in_full(store: Store, tmp_path: Path) -> None:
    states = [make_state(seed) for seed in range(3)]
    saved = []
    for seed, state in enumerate(states):
        root = store.add_base(write_base(tmp_path / f"{seed}.safetensors", state))
        saved.append((store.save(state, parent=root), state))
        moved = train_step(state, 0.1, seed)
        saved.append((store.save(moved, parent=saved[-1][0]), moved))
    target = zeros(states[0])

    for now, (checkpoint, expected) in zip(
        store.sweep(target, [checkpoint.id for checkpoint, _ in saved]), saved, strict=True
    ):
        assert now == checkpoint
        assert same_bits(target, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numba", ["1", "0"])
def test_undo_gives_the_reference_back_and_is_not_larger(
    dtype: codecs.DType, kind: str, numba: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSFT_STORE_NUMBA", numba)
    for seed, size in enumerate(SIZES):
        pair = pair_of(dtype, size, kind, seed)
        new, old = (lanes.view("u1") for lanes in pair)
        for codec in (codecs.DELTA, codecs.SPARSE, codecs.COMPACT):
            out = old.copy()
            undo = codec.decode_with_undo(codec.encode(new, old, dtype), out, dtype)
            assert out.tobytes() == new.tobytes()
            assert undo.nbytes <= new.nbytes
            undo.apply(out)
            assert out.tobytes() == old.tobytes()


def test_undo_of_no_change_takes_no_memory() -> None:
    new, _ = pair_of(BF16, 100, "trained", 0)
    assert compare(new.view("u1"), new.view("u1").copy(), 2).nbytes == 0
