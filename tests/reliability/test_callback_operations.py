"""A training with ``StoreCallback`` that stops at any system call ends like an undisturbed one."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from msft_store import Store
from tests.support.disk import Disk, Tree, after_kill, after_power_loss, write_tree
from tests.support.ledger import Ledger
from tests.support.runs import left_by_trainer
from tests.support.stopped_training import train
from tests.support.trainers import make_model

RUN = "run"


def announced(tree: Tree) -> int:
    """Return the step of the newest save that the other callbacks were told of; 0 if none."""
    steps = [int(found[1]) for path in tree if (found := re.fullmatch(rf"{RUN}/saved-(\d+)", path))]
    return max(steps, default=0)


def kept(store: Path) -> int:
    """Return the step of the resume point in a store; 0 if there is none."""
    if not (store / "store.json").exists():
        return 0
    points = [c for c in Store.open(store).log() if c.metadata["timeline"]["name"] == "main-resume"]
    return max((c.step or 0 for c in points), default=0)


@pytest.mark.usefixtures("without_fsync")
def test_a_training_is_the_same_whatever_a_crash_leaves(
    tmp_path: Path, faults: Ledger, seed: int, soak: bool
) -> None:
    base, live, broken = tmp_path / "base", tmp_path / "live", tmp_path / "broken"
    make_model().float().save_pretrained(base)
    live.mkdir()
    with Disk(live) as disk:
        train(live / RUN, base)
    whole = left_by_trainer(str(live / RUN))
    rng = random.Random(seed)  # noqa: S311
    every = len(disk.moments) // (100 if soak else 6)
    chosen = disk.moments[rng.randrange(every) :: every]
    for moment in disk.moments:
        with faults.inject("power loss in a Trainer's run"):
            write_tree(after_power_loss(moment, None), broken)
            assert kept(broken / RUN / "store") >= announced(after_kill(moment)), moment.call
        if moment not in chosen:
            continue
        chances = {
            "kill at a call of a Trainer's run, resumed": after_kill(moment),
            "power loss in a Trainer's run, resumed": after_power_loss(
                moment, rng.choice([None, rng, rng])
            ),
        }
        kind = rng.choice([*chances])
        with faults.inject(kind):
            # A directory to resume from would not be deleted, because its process still lives.
            tree = {path: data for path, data in chances[kind].items() if "/.resume-" not in path}
            write_tree(tree, broken)
            train(broken / RUN, base)
            assert left_by_trainer(str(broken / RUN)) == whole
