"""Batches are a pure function of seed and position."""

from __future__ import annotations

import numpy as np

from trainer.data.batches import DataOrder, micro_batches

LENGTHS = np.random.default_rng(1).integers(3, 60, size=203).tolist()


SIZES = {"a": 100, "b": 60, "c": 43}


def order(**changes):
    arguments = {"seed": 0, "stage": 1, "sizes": SIZES, "batch_size": 32}
    return DataOrder.fresh(**{**arguments, **changes})


def plan(*, epoch=0, micro_batch_size=8, **changes):
    """The micro-batches of an epoch of seven steps, as positions in the mixture."""
    starts, steps = {"a": 0, "b": 100, "c": 160}, []
    for step in range(7 * epoch, 7 * epoch + 7):
        positions = [starts[name] + i for name, i in order(**changes).step(step)]
        steps.append(micro_batches(positions, LENGTHS, micro_batch_size))
    return tuple(steps)


def test_an_epoch_holds_every_example_once():
    steps = plan()
    assert sorted(i for step in steps for micro in step for i in micro) == list(range(203))
    assert [sum(map(len, step)) for step in steps] == [32] * 6 + [11]
    assert all(len(micro) <= 8 for step in steps for micro in step)


def test_plans_repeat_and_differ_by_seed_stage_and_epoch():
    assert plan() == plan()
    others = [plan(), plan(seed=1), plan(stage=2), plan(epoch=1)]
    assert len(set(others)) == len(others)


def continued(step, names, start=None):
    sizes = {name: SIZES[name] for name in names}
    return (start or order()).continued(step=step, sizes=sizes, counts=sizes)


def test_a_floor_keeps_a_share_of_the_examples_behind_a_limit():
    limits = {"a": 1.5, "b": 0.5}
    hard, soft = order(limits=limits), order(limits=limits, floor=0.1)
    sizes = dict(
        zip("xyz", zip(hard.epoch_sizes(3), soft.epoch_sizes(3), strict=True), strict=True)
    )
    kept = [r for step in range(8) for r in soft.step(step)]
    first = soft.epoch_sizes(3)[0]
    assert [r for r in kept[:first] if r[0] != "b"] == [
        r for r in order().step(0) + sum((order().step(i) for i in range(1, 7)), ()) if r[0] != "b"
    ]
    before = [r for r in sum((hard.step(i) for i in range(7)), ()) if r[0] == "b"]
    assert [r for r in kept[:first] if r[0] == "b"][: len(before)] == before[: len(before)]
    assert sizes["z"] == (43, 43 + 10 + 6), "a tenth of 100 and of 60"
    assert sizes["x"][1] - sizes["x"][0] == -(-(60 - sum(r[0] == "b" for r in before)) // 10)


def test_an_order_that_goes_on_with_everything_is_the_same_order():
    for start in range(16):
        later = continued(start, SIZES)
        again = continued(3, SIZES, later)
        for step in range(12):
            assert later.step(step) == order().step(start + step)
            assert again.step(step) == order().step(start + 3 + step)


def test_an_order_that_goes_on_takes_what_is_left_of_the_active_ones_first():
    later = continued(2, "ac")
    left = [r for step in range(2, 7) for r in order().step(step) if r[0] != "b"]
    assert [r for step in range(4) for r in later.step(step)][: len(left)] == left
    begun = -(-len(left) // 32)
    epoch = [r for step in range(begun, begun + 5) for r in later.step(step)]
    assert sorted(epoch) == [(name, i) for name in "ac" for i in range(SIZES[name])]
    assert epoch != [r for step in range(5) for r in later.step(step)][: len(epoch)]


def test_an_exhausted_order_continues_with_the_next_epoch():
    later = continued(7, "b")
    assert later.step(0) == continued(7, "b").step(0)
    assert {r for step in range(2) for r in later.step(step)} == {("b", i) for i in range(60)}


def test_an_order_that_goes_on_with_shares_takes_a_part_of_what_is_left():
    rest = [r for step in range(2, 7) for r in order().step(step)]
    b = sum(name == "b" for name, _ in rest)
    later = order().continued(step=2, sizes=SIZES, counts={**SIZES, "b": SIZES["b"] // 4})
    first = len(rest) - b + -(-b // 4)
    found = [r for step in range(8) for r in later.step(step)][:first]
    assert sum(name == "b" for name, _ in found) == -(-b // 4)
    assert [r for r in found if r[0] != "b"] == [r for r in rest if r[0] != "b"]
    begun = -(-first // 32)
    epoch = later.continued(step=begun, sizes=SIZES, counts={**SIZES, "b": SIZES["b"] // 4})
    names = [name for name, _ in epoch.left]
    assert names.count("b") == SIZES["b"] // 4


def test_a_sub_dataset_that_comes_back_begins_with_the_next_epoch():
    later = continued(2, SIZES, continued(1, "ac"))
    left = {name for name, _ in later.left}
    assert left == {"a", "c"}
    begun = -(-len(later.left) // 32)
    epoch = [r for step in range(begun, begun + 20) for r in later.step(step)]
    assert {name for name, _ in epoch} == set(SIZES)


def test_the_examples_of_a_step_do_not_depend_on_the_micro_batch_size():
    def examples(steps):
        return [sorted(i for micro in step for i in micro) for step in steps]

    assert examples(plan(micro_batch_size=8)) == examples(plan(micro_batch_size=32))


def test_sorting_into_micro_batches_saves_padding():
    def padding(steps):
        return sum(
            max(LENGTHS[i] for i in micro) * len(micro) - sum(LENGTHS[i] for i in micro)
            for step in steps
            for micro in step
        )

    assert padding(plan(micro_batch_size=8)) < padding(plan(micro_batch_size=32)) / 3


def test_micro_batches_are_even_and_longest_first():
    batches = micro_batches(range(7), [1, 9, 3, 9, 5, 2, 8], 3)
    assert batches == ((1, 3, 6), (4, 2), (5, 0))
