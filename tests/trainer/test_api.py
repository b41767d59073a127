"""The Python API of the trainer gives the same results as the command."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from msft_store import Store
from tests.support.tiny_runs import make_config
from tests.test_layers import public_names
from trainer.journal import read
from trainer.report.summary import summarize

FUNCTIONS = ("compare", "load_config", "resume", "run")


def import_all_submodules() -> None:
    for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
        importlib.import_module(module.name)


def test_a_run_is_begun_resumed_and_compared_after_all_submodules_are_imported(
    tmp_path: Path,
) -> None:
    import_all_submodules()
    assert all(inspect.isfunction(getattr(trainer, name)) for name in FUNCTIONS)
    make_config(tmp_path, msft__compute_budget=0.5, msft__max_stages=1)
    path = tmp_path / "config.yaml"
    config = trainer.load_config(path, [f"output_dir={tmp_path / 'run'}", "seed=3"])
    result = trainer.run(config)
    assert result.directory == tmp_path / "run"
    assert result.summary == summarize(read(tmp_path / "run/journal.jsonl"))
    assert result.summary.seed == 3
    assert (result.model / "model.safetensors").is_file()
    assert Store.open(result.store).check() == []
    assert trainer.resume(tmp_path / "run") == result
    both = trainer.load_config(path, [f"output_dir={tmp_path / 'both'}"])
    comparison = trainer.compare(both, ["sft", "msft"])
    assert [row.method for row in comparison.groups[0].rows] == ["sft", "msft"]
    with pytest.raises(trainer.RunError, match="there is a run in"):
        trainer.run(config)
    with pytest.raises(trainer.RunError, match="there is no run in"):
        trainer.resume(tmp_path / "data")
    with pytest.raises(trainer.ConfigError, match=r"train\.lr"):
        trainer.load_config(path, ["train.lrr=1"])
    with pytest.raises(trainer.ConfigError, match="at least one method"):
        trainer.compare(both, [])


def test_the_public_names_are_sorted_complete_and_documented() -> None:
    names = trainer.__all__
    assert names == sorted(set(names))
    assert set(names) == public_names("trainer")
    assert all(inspect.getdoc(getattr(trainer, name)) for name in names)
    for name in FUNCTIONS:
        text = inspect.getdoc(getattr(trainer, name)) or ""
        assert all(f"\n{part}:" in text for part in ("Args", "Returns", "Raises")), name


def test_importing_the_trainer_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "transformers", "accelerate", "yaml", "msft_store")
    code = f"import sys, trainer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
