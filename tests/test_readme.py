"""Check the README: its length, its example, commands and configuration, and its figures."""

from __future__ import annotations

import json
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
MOST_WORDS = 1_500


def find_blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_the_example_has_twelve_lines_and_prints_the_shown_output(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (code,) = find_blocks("python")
    shown = find_blocks("text", README.partition(code)[2])[0]
    assert len([line for line in code.splitlines() if line]) == 12
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def find_commands() -> list[list[str]]:
    """Return the words of each of this project's command lines, in blocks and in the text."""
    found = re.findall(r"^(msft-(?:store|train) [^#\n]+)", "".join(find_blocks("sh")), re.MULTILINE)
    found += re.findall(r"`(msft-(?:store|train) [^`]+)`", README)
    # A line of two words is the name of a subcommand without its arguments.
    return [words for line in found if len(words := shlex.split(line)) > 2]


def test_the_pages_contain_commands() -> None:
    assert len(find_commands()) >= 8


@pytest.mark.parametrize("words", find_commands(), ids=" ".join)
def test_every_command_is_accepted(words: list[str]) -> None:
    parser = {"msft-store": store_cli._parser, "msft-train": train_cli._parser}[words[0]]
    parser().parse_args(words[1:])


@pytest.mark.parametrize("page", ["README.md", "docs/howto/data.md"])
def test_the_configuration_is_accepted(page: str, tmp_path: Path) -> None:
    (block,) = find_blocks("yaml", (ROOT / page).read_text(encoding="utf-8"))
    for name in re.findall(r"\w+\.\w+\.(?:jsonl|parquet)", block):
        (tmp_path / name).touch()
    (tmp_path / "path" / "to" / "model").mkdir(parents=True)
    path = tmp_path / "config.yaml"
    path.write_text(block, encoding="utf-8")
    assert next(iter(load_config(path).data.sub_datasets)) == "mine"


def test_the_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_figures_are_those_of_the_results() -> None:
    page = headline.PAGE.read_text(encoding="utf-8")
    shown = page.partition(headline.BEGIN)[2].partition(headline.END)[0]
    assert shown.strip() == headline.table()


def test_the_three_rows_are_those_of_the_results() -> None:
    msft, hugging_face, codec = re.findall(
        r"^\| [^|]+ \| \*\*([\d.]+)(?: %)?\*\*[^|]*\| ([\d.]+)", README, re.MULTILINE
    )
    run = json.loads((headline.RESULTS / "arena_msft.json").read_text(encoding="utf-8"))["run"]
    assert list(msft) == [f"{run['peak']:.3f}", str(run["paper_peak"])]
    results = json.loads((headline.RESULTS / "huggingface.json").read_text(encoding="utf-8"))
    ways = ("StoreCallback, the best of every sub-dataset", "checkpoint-*, all")
    measured = [results["runs"][way][0]["largest"] / results["full"] for way in ways]
    assert list(hugging_face) == [f"{measured[0]:.2f}", f"{measured[1]:.1f}"]
    row = headline.table().splitlines()[2]
    assert [f"{value} %" in row for value in codec] == [True, True]


def test_the_figures_of_the_demo_are_the_same_on_both_pages() -> None:
    peaks = re.findall(r"(?:on disk|same run): peak ([\d.]+), mean ([\d.]+)", README)
    page = headline.PAGE.read_text(encoding="utf-8").partition("## The demo")[2]
    assert f"at most {peaks[0][0]} of one full checkpoint, and {peaks[0][1]} on average" in page
    assert f"same run takes {peaks[1][0]} and {peaks[1][1]}" in " ".join(page.split())
