"""The page of error messages quotes messages that the sources really have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from msft_store.errors import REPAIR_HINT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def read_messages() -> Iterator[str]:
    """Yield each string of the sources, with an ellipsis for each changing part."""
    for package in ("msft_store", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", "") for part in node.values]
                    text = "".join(part if isinstance(part, str) else "…" for part in parts)
                    named = any("REPAIR_HINT" in ast.unparse(part) for part in node.values)
                    yield text[:-1] + REPAIR_HINT if named and text.endswith("…") else text
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


MESSAGES = list(read_messages())


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_sources(quoted: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, quoted.split("…"))), re.DOTALL)
    assert any(pattern.search(message) for message in MESSAGES)


def test_the_page_has_messages() -> None:
    assert len(QUOTED) >= 20
