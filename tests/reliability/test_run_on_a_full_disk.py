"""A run on a full disk pauses, loses nothing, and ends like a run with enough space."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msft_store import Store
from tests.support.ledger import Ledger
from tests.support.tiny_runs import make_config
from tests.trainer.training.test_resume import outcome
from trainer.cli import main as cli
from trainer.config.schema import Config
from trainer.errors import PausedError
from trainer.journal import read
from trainer.training import run
from trainer.training.run import resume, start

FULL = OSError(errno.ENOSPC, "No space left on device")
PAUSED = 75


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would take half of the time."""
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three stages, with roll-backs, in about a second."""
    directory = tmp_path_factory.mktemp("space")
    return make_config(directory, msft__max_stages=3, train__lr=0.02, resume_every=3, log_every=1)


@pytest.fixture(scope="module")
def reference(config: Config) -> Any:
    """The outcome of a run with enough space, as in ``test_resume``."""
    config = replace(config, output_dir=f"{config.output_dir}-reference")
    start(config)
    return outcome(Path(config.output_dir))


class FullDisk:
    """Fails the system calls that need space, from the n-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, below: Path) -> None:
        self.at, self.count, self.full = at, 0, True
        self._below = str(below)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, original: Any) -> Any:
        def call(target: Any, *more: Any, **keywords: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            if str(path).startswith(self._below):
                self.count += 1
                if self.full and self.count > self.at:
                    raise FULL
            return original(target, *more, **keywords)

        return call


@pytest.mark.parametrize("async_save", [True, False])
def test_a_run_pauses_at_any_full_disk_and_continues(
    *,
    config: Config,
    reference: Any,
    faults: Ledger,
    soak: bool,
    capsys: pytest.CaptureFixture[str],
    async_save: bool,
) -> None:
    directory = Path(f"{config.output_dir}-full")
    command = ["run", str(directory.parent / "config.yaml"), f"output_dir={directory}", "--quiet"]
    codes = []
    for at in itertools.count(step=3) if soak else itertools.chain((0, 2), itertools.count(9, 90)):
        shutil.rmtree(directory, ignore_errors=True)
        with faults.inject("a full disk during a run"), pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, at, directory)
            codes.append(cli.main([*command, f"async_save={str(async_save).lower()}"]))
            said = capsys.readouterr().err
            disk.full = False
            if codes[-1] == PAUSED:
                assert "space left" in said
                assert f"continue with `msft-train resume {directory}`" in said
                assert list((directory / "store/tmp").glob("*")) == []
                resume(directory)
            elif codes[-1] == 1:
                assert "the run did not begin: " in said
                assert not directory.exists()
                start(replace(config, output_dir=str(directory), async_save=async_save))
            assert outcome(directory) == reference
            assert Store.open(directory / "store").check() == []
        if codes[-1] == 0:
            assert disk.count <= at
            break
    assert set(codes) == {0, 1, PAUSED}


def test_a_run_pauses_at_its_budget_and_goes_on_with_a_larger_one(
    config: Config, reference: Any, faults: Ledger, soak: bool
) -> None:
    directory = Path(f"{config.output_dir}-budget")
    said: list[str] = []
    for share in range(20, 400, 7 if soak else 120):
        shutil.rmtree(directory, ignore_errors=True)
        with faults.inject("a disk budget too small for a run"):
            limited = replace(config, output_dir=str(directory), max_disk=f"{share / 100}x")
            try:
                start(limited)
            except PausedError as error:
                said.append(str(error))
                last = read(directory / "journal.jsonl")[-1]
                assert last["event"] == "paused"
                text = (directory / "config.yaml").read_text(encoding="utf-8")
                raised = text.replace(f"max_disk: {limited.max_disk}", "max_disk: 100x")
                (directory / "config.yaml").write_text(raised, encoding="utf-8")
                resume(directory)
            assert outcome(directory) == reference
            assert Store.open(directory / "store").check() == []
    assert len(said) > 1
    for text in said:
        assert "the commit that was not saved would have been" in text.lower()
        assert f"raise max_disk in {directory / 'config.yaml'}" in text
