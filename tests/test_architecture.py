"""The pages for contributors: the picture is up to date, and every linked file exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import module_graph

ROOT = Path(__file__).parent.parent
PAGES = ("docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def test_the_picture_of_the_groups_is_up_to_date() -> None:
    assert module_graph.main(["--check"]) == 0


def test_an_outdated_picture_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module_graph, "BOX_WIDTH", module_graph.BOX_WIDTH + 1)
    assert module_graph.main(["--check"]) == 1
    assert "run python docs/module_graph.py" in capsys.readouterr().err


def test_a_group_is_drawn_above_all_that_it_imports() -> None:
    graph = {"cli": {"store", "errors"}, "store": {"errors"}, "errors": set()}
    assert module_graph.layers(graph) == {"cli": 2, "store": 1, "errors": 0}
    assert module_graph.direct_edges(graph) == [("cli", "store"), ("store", "errors")]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_links_to_exist(page: str) -> None:
    path = ROOT / page
    links = _LINK.findall(path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
