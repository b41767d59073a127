"""The pages of the documentation: all their code runs, and the site builds without a warning."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoTokenizer

from msft_store import Candidate, KeepLast, Store, Timeline
from msft_store.integrations.dcp import StorageWriter
from trainer.algorithms import base as strategy
from trainer.algorithms.msft import Msft

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if re.search(r"^```(python|sh)$", path.read_text(encoding="utf-8"), re.MULTILINE)
)
DOCUMENTED = sorted(
    name
    for path in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"automodule:: (\S+)", path.read_text(encoding="utf-8"))
)
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

DRIVER = """
import pathlib, re, subprocess, sys
page = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
scope = {"__name__": "__main__"}
for kind, code in re.findall(sys.argv[2], page, re.MULTILINE | re.DOTALL):
    if kind == "python":
        exec(compile(code, sys.argv[1], "exec"), scope)
    elif not code.startswith(("pip install", "make ")):
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
"""


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT / "docs"))


def test_the_pages_with_code_are_known() -> None:
    assert {"tutorial.md", "howto/huggingface.md", "howto/dcp.md"} <= set(map(identify, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, page, _BLOCK.pattern],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that the examples of docstrings assume; the examples run in a run's directory."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters())
    accelerator = Accelerator(cpu=True)
    save_file(model.state_dict(), "base.safetensors")
    store = Store.create("run/store")
    base = store.add_base("base.safetensors")
    timeline = Timeline(store, base, retention=KeepLast(2))
    metrics = {"arith": 0.5, "dates": 0.4, "overall": 0.45}
    store.pin(store.save(model, parent=base, metrics=metrics), "best")
    evaluation = strategy.Evaluation(
        stage=1, index=0, epoch=0.0, step=0, checkpoint="root", metrics=metrics, last=False
    )
    weights = model.state_dict()
    return {
        "accelerator": accelerator,
        "base": base,
        "dcp": dcp,
        "candidates": [Candidate(id="one", metrics=metrics, stored_bytes=10)],
        "evaluation": evaluation,
        "Msft": Msft,
        "model": model,
        "model_state": weights,
        "optimizer": optimizer,
        "state": {"model": weights},
        "store": store,
        "timeline": timeline,
        "tokenizer": AutoTokenizer.from_pretrained(ROOT / "examples/stdlib_tasks/base"),
        "weights": weights,
        "writer": StorageWriter("run/store", name="other"),
    }


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_of_a_module_with_a_page_runs(name: str, scope: dict[str, Any]) -> None:
    module = importlib.import_module(name)
    _, marked, rest = (module.__doc__ or "").partition("Example::\n\n")
    if not marked:
        assert name == "msft_store.errors"
        return
    code = textwrap.dedent(re.split(r"\n(?=\S)", rest)[0])
    here = Path.cwd()
    for place, real in {
        "s3://bucket/run": (here / "remote").as_uri(),
        "models/qwen": "base.safetensors",
    }.items():
        code = code.replace(place, real)
    exec(compile(code, name, "exec"), {**vars(module), **scope})  # noqa: S102


def test_every_command_is_on_the_page_of_commands() -> None:
    page = (ROOT / "docs" / "howto" / "command.md").read_text(encoding="utf-8")
    source = "".join(
        (ROOT / "msft_store" / "cli" / name).read_text(encoding="utf-8")
        for name in ("main.py", "remote.py")
    )
    commands = set(re.findall(r"\badd\(\s*\"([a-z-]+)\"", source))
    assert len(commands) > 18
    assert [
        name for name in sorted(commands) if f"`{name}" not in page and f" {name}" not in page
    ] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-E",
            "docs",
            tmp_path / "site",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "store.html").read_text(encoding="utf-8")
    assert 'id="msft_store.Store.save"' in page
    assert ":class:" not in page
