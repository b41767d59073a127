"""Batches are a pure function of seed and position."""

from __future__ import annotations

import numpy as np

from trainer.batches import epoch_plan, micro_batches

LENGTHS = np.random.default_rng(1).integers(3, 60, size=203).tolist()


def plan(**changes):
    arguments = {
        "seed": 0,
        "stage": 1,
        "epoch": 0,
        "lengths": LENGTHS,
        "batch_size": 32,
        "micro_batch_size": 8,
    }
    return epoch_plan(**{**arguments, **changes})


def test_an_epoch_holds_every_example_once():
    steps = plan()
    assert sorted(i for step in steps for micro in step for i in micro) == list(range(203))
    assert [sum(map(len, step)) for step in steps] == [32] * 6 + [11]
    assert all(len(micro) <= 8 for step in steps for micro in step)


def test_plans_repeat_and_differ_by_seed_stage_and_epoch():
    assert plan() == plan()
    others = [plan(), plan(seed=1), plan(stage=2), plan(epoch=1)]
    assert len(set(others)) == len(others)


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
