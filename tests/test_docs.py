"""The pages of the documentation: all their code runs, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if re.search(r"^```(python|sh)$", path.read_text(encoding="utf-8"), re.MULTILINE)
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
    place = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, page, _BLOCK.pattern],
        cwd=tmp_path,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_on_the_page_of_commands() -> None:
    page = (ROOT / "docs" / "howto" / "command.md").read_text(encoding="utf-8")
    source = "".join(
        (ROOT / "msft_store" / name).read_text(encoding="utf-8")
        for name in ("cli.py", "cli_remote.py")
    )
    commands = set(re.findall(r"\badd\(\s*\"([a-z-]+)\"", source))
    assert len(commands) > 18
    assert [
        name for name in sorted(commands) if f"`{name}" not in page and f" {name}" not in page
    ] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).parent / "mkdocs"
    assert mkdocs.exists() or shutil.which("mkdocs"), "pip install 'msft-store[docs]'"
    done = subprocess.run(
        [mkdocs if mkdocs.exists() else "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "store" / "index.html").exists()
