"""``Store.chunks`` yields parts that make up the tensors of ``Store.load``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from msft_store import CorruptedError, MismatchError, Store
from tests.support.states import State, make_state, same_bits, train_step

CHUNK_BYTES = 1 << 22


def joined(store: Store, checkpoint: str, like: State) -> State:
    state = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    for name, start, part in store.chunks(checkpoint):
        assert part.dim() == 1
        assert 0 < part.nbytes <= CHUNK_BYTES
        state[name].view(-1)[start : start + part.numel()] = part
    return state


def test_parts_make_up_every_tensor(store: Store) -> None:
    state = make_state(big=True)
    parent = store.save(state)
    child = store.save(train_step(state, 0.02, 1), parent=parent)

    assert same_bits(joined(store, child.id, state), store.load(child))
    (first, second, *_) = store.chunks(child, ["model.embed.weight"])
    assert (first[1], second[1]) == (0, CHUNK_BYTES // 2)


def test_checkpoints_of_equal_shapes_have_equal_parts(store: Store) -> None:
    state = make_state(big=True)
    one, other = store.save(state), store.save(train_step(state, 0.5, 1))

    def places(checkpoint: str) -> list[tuple[str, int, int]]:
        return [(name, start, len(part)) for name, start, part in store.chunks(checkpoint)]

    assert places(one.id) == places(other.id)
    assert sum(size for _, _, size in places(one.id)) == sum(
        math.prod(tensor.shape) for tensor in state.values()
    )


def test_only_named_tensors_are_read_in_the_order_of_the_names(store: Store, state: State) -> None:
    saved = store.save(state)
    wanted = ["model.scale", "lm_head.weight"]

    assert [name for name, _, _ in store.chunks(saved, wanted)] == wanted
    with pytest.raises(MismatchError, match="no other"):
        list(store.chunks(saved, ["other"]))


def test_parts_may_be_written_to(store: Store, state: State) -> None:
    saved = store.save(state)

    for _, _, part in store.chunks(saved):
        part.zero_()

    assert same_bits(store.load(saved), state)


def test_a_damaged_part_is_an_error(store: Store, state: State) -> None:
    saved = store.save(state)
    (pack,) = Path(store.path).glob("packs/*")
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)

    with pytest.raises(CorruptedError, match="tensor"):
        list(Store.open(store.path).chunks(saved.id))
