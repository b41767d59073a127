"""A training run that stops at any system call ends like an undisturbed run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msft_store import Store
from tests.support.disk import Disk, Moment, Tree, after_kill, after_power_loss, write_tree
from tests.support.ledger import Ledger
from tests.support.runs import outcome
from tests.support.tiny_runs import make_config
from trainer.config.schema import Config
from trainer.journal import read
from trainer.report.summary import summarize
from trainer.training import run
from trainer.training.run import resume, start

RUN = "runs/run"
VARIANTS: dict[str, dict[str, Any]] = {
    "commits in the background": {"resume_every": 4},
    "commits at once": {"resume_every": 3, "async_save": False},
}


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the plots, which would take half of the time of a test."""
    monkeypatch.setattr(run, "write_report", lambda d: summarize(read(Path(d) / "journal.jsonl")))


def go_on(config: Config, directory: Path) -> None:
    """Start the run, or resume it if it has begun."""
    if (directory / "config.yaml").exists():
        resume(directory)
    else:
        start(replace(config, output_dir=str(directory)))


def lines(tree: Tree) -> list[bytes]:
    """Return the complete lines of the journal in a tree."""
    return (tree.get(f"{RUN}/journal.jsonl") or b"").splitlines(keepends=True)


def assert_kept(moment: Moment, whole_model: bytes) -> None:
    """Assert that every record of the journal is durable, with the files that it refers to."""
    written, tree = lines(after_kill(moment)), after_power_loss(moment, None)
    # The last line may be the one that is being written.
    assert lines(tree)[: len(written) - 1] == written[:-1], moment.call
    if lines(tree):
        assert tree.get(f"{RUN}/config.yaml")
    if any(b'"finished"' in line for line in lines(tree)):
        assert tree[f"{RUN}/model/model.safetensors"] == whole_model


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_the_same_whatever_a_crash_leaves(
    tmp_path: Path, faults: Ledger, variant: str, seed: int, soak: bool
) -> None:
    config = make_config(tmp_path, train__lr=0.02, log_every=1, **VARIANTS[variant])
    live, broken = tmp_path / "live", tmp_path / "broken"
    live.mkdir()
    with Disk(live) as disk:
        go_on(config, live / RUN)
    whole = outcome(live / RUN)
    rng = random.Random(seed)  # noqa: S311
    for moment in disk.moments:
        with faults.inject("power loss in a training run"):
            assert_kept(moment, whole[1])
    every = len(disk.moments) // (100 if soak else 4)
    for moment in disk.moments[rng.randrange(every) :: every]:
        chances = {
            "kill at a call of a training run, resumed": after_kill(moment),
            "power loss in a training run, resumed": after_power_loss(
                moment, rng.choice([None, rng, rng])
            ),
        }
        kind = rng.choice([*chances])
        with faults.inject(kind):
            write_tree(chances[kind], broken)
            go_on(config, broken / RUN)
            assert outcome(broken / RUN) == whole
            store = Store.open(broken / RUN / "store")
            assert store.check() == []
            assert store.refs() == Store.open(live / RUN / "store").refs()
            assert names(broken / RUN) == names(live / RUN)


def names(directory: Path) -> list[str]:
    """Return the content of a directory."""
    return sorted(path.name for path in directory.iterdir())
