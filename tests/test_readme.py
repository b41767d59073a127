"""The README: its code runs as it stands, and its map names every file."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import headline
from msft_store.cli import main as store_cli
from trainer.cli import main as train_cli
from trainer.config.load import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_block() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(block)


def mapped() -> list[Path]:
    """Return the paths of the file map; in a row, later names may leave out the first folder."""
    (section,) = re.findall(r"^## Where things are\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    paths = []
    for cell in re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        top = names[0].partition("/")[0]
        paths += [Path(names[0]), *(Path(top, name) for name in names[1:])]
    return paths


def test_the_code_runs_and_the_store_is_sound_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", python_block()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "runs" / "readme-model" / "model.safetensors").is_file()


def commands() -> list[list[str]]:
    """Return the words of every command line of ours, in blocks and in the text."""
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    found = re.findall(r"^(?:\.venv/bin/)?(msft-(?:store|train) [^#\n]+)", blocks, re.MULTILINE)
    found += re.findall(r"`(msft-store (?!\[)[^`]+)`", README)
    found += [f"msft-train {rest}" for rest in re.findall(r"-m trainer ([^`]+)`", README)]
    # A verb alone is only named.
    return [words for line in found if len(words := shlex.split(line)) > 2]


def test_there_are_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_that_is_understood(words: list[str]) -> None:
    parser = {"msft-store": store_cli._parser, "msft-train": train_cli._parser}[words[0]]
    parser().parse_args(words[1:])


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    path = tmp_path / "config.yaml"
    for name in re.findall(r"mine[.\w]+", block):
        (tmp_path / name).touch()
    path.write_text(f"output_dir: run\nmodel: {{path: base}}\n{block}", encoding="utf-8")
    config = load_config(path)
    assert list(config.data.sub_datasets) == ["mine", "gsm8k"]


def test_everything_on_the_map_is_there() -> None:
    paths = mapped()
    assert len(paths) == len(set(paths)) > 20
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []


def test_the_figures_are_those_of_the_results() -> None:
    _, _, rest = README.partition(headline.BEGIN)
    shown, _, _ = rest.partition(headline.END)
    assert shown.strip() == headline.table()


@pytest.mark.parametrize("package", ["msft_store", "trainer"])
def test_every_module_is_on_the_map(package: str) -> None:
    modules = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
    named = {path for path in modules if not path.name.startswith("__")}
    assert sorted(map(str, named - set(mapped()))) == []
