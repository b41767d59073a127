"""A load into memory that holds some of the chunks rewrites the others, and believes no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msft_store import Base, Checkpoint, CorruptedError, KeepLast, Store, Timeline
from tests.support.states import State, same_bits, train_step

COUNT = 80
"""Tensors of one chunk each: more bytes than a load looks at in vain before it stops."""


@pytest.fixture
def large() -> State:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{number:02}": (0.02 * torch.randn(2**17, generator=generator)).bfloat16()
        for number in range(COUNT)
    }


def damage_payloads(store: Store) -> None:
    """Overwrite the first bytes of each pack's payloads, but no footer."""
    for pack in Path(store.path).glob("packs/*"):
        data = bytearray(pack.read_bytes())
        data[16:4096] = bytes(4080)
        pack.write_bytes(data)


def test_chunks_that_memory_holds_are_not_read(store: Store, large: State) -> None:
    saved = store.save(large)
    target = {name: tensor.clone() for name, tensor in large.items()}
    damage_payloads(store)

    store.load_into(target, saved)

    assert same_bits(target, large)


def test_a_chunk_that_differs_is_read(store: Store, large: State) -> None:
    saved = store.save(large)
    target = {name: tensor.clone() for name, tensor in large.items()}
    target["00"][-1] += 1
    damage_payloads(store)

    with pytest.raises(CorruptedError, match="'00'"):
        store.load_into(target, saved)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("order", ["mixed", "changed first", "changed last"])
def test_any_mixture_of_equal_and_changed_chunks_is_restored(
    store: Store, large: State, share: float, order: str
) -> None:
    saved = store.save(large)
    generator = torch.Generator().manual_seed(4)
    places = torch.randperm(COUNT, generator=generator).tolist()
    changed = {
        "mixed": places[: round(share * COUNT)],
        "changed first": range(round(share * COUNT)),
        "changed last": range(COUNT - round(share * COUNT), COUNT),
    }[order]
    target = {name: tensor.clone() for name, tensor in large.items()}
    for number in changed:
        target[f"{number:02}"][number] += 1

    store.load_into(target, saved)

    assert same_bits(target, large)


def test_a_roll_back_undoes_a_change_that_no_commit_has(
    store: Store, base: Base, state: State
) -> None:
    with Timeline(store, base, retention=KeepLast(2)) as timeline:
        first: Checkpoint = timeline.commit(train_step(state, 0.01, 1))
        want = store.load(first)
        memory = {name: tensor.clone() for name, tensor in want.items()}
        timeline.commit(memory)
        memory["model.layers.1.up.weight"][3, 5] += 1

        timeline.rollback(first, into=memory)

    assert same_bits(memory, want)
