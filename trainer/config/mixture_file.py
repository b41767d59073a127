r"""A whole mixture in one JSON file, in the format of the MSFT paper's released code.

The file holds an object with one list of rows per part (``train``, ``validation``, …), or one list
of rows. A row has ``input`` (the question: a string, or a list of one message with ``content``),
``answer``, ``category`` (its sub-dataset) and, optionally, ``output`` (a worked solution). As in
the released code, the prompt is ``Q: input\nA:``. The completion is ``output`` if that contains
``####``, otherwise ``#### answer``.

Example::

    rows = read_mixture(Path("mix.json"), "train")
    name_categories(rows, "mix.json")       # {"openai_gsm8k_main": "openai/gsm8k/main", …}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import DataError

MARK = "####"
ANSWER_PATTERN = r"####\s*([^\n]*?)\.?\s*(?:\n|$)"
"""The pattern for ``evaluation.answer_pattern`` by which the released code finds the answer."""
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")


def read_mixture(path: Path, part: str) -> list[dict[str, Any]]:
    """Return the rows of one part of a file; raises :class:`DataError` with the file."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from None
    if isinstance(tree, dict):
        if part not in tree:
            raise DataError(f"{path} has no part {part!r}, only {', '.join(tree) or 'nothing'}")
        tree = tree[part]
    if not isinstance(tree, list):
        raise DataError(f"{path}: {part!r} must be a list of rows, not a {type(tree).__name__}")
    for number, row in enumerate(tree, start=1):
        category = row.get("category") if isinstance(row, dict) else None
        if not isinstance(category, str) or not category:
            raise DataError(
                f"{path}, row {number} of {part!r}: it must be an object with a 'category', a "
                "string that names its sub-dataset"
            )
    return tree


def name_categories(rows: Iterable[Mapping[str, Any]], path: str | Path) -> dict[str, str]:
    """Return the sub-datasets of a file: name → category, sorted.

    A name is the category with ``_`` in place of invalid characters, as in ``openai_gsm8k_main``.
    Raises :class:`DataError` if two categories would have the same name.
    """
    found: dict[str, str] = {}
    for category in sorted({row["category"] for row in rows}):
        name = _OTHER.sub("_", category).strip("_-")[:64]
        if not name:
            raise DataError(f"{path}: the category {category!r} has no letter or digit")
        if name in found:
            raise DataError(
                f"{path}: the categories {found[name]!r} and {category!r} would both be named "
                f"{name!r}; rename one"
            )
        found[name] = category
    return found


def normalize_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its ``input`` as a string; raises :class:`DataError` if it has none."""
    question = row.get("input")
    if isinstance(question, list) and len(question) == 1 and isinstance(question[0], dict):
        question = question[0].get("content")
    if not isinstance(question, str):
        raise DataError("'input' must be a string, or a list of one message with 'content'")
    return {**row, "input": question.strip()}


def to_completion_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a normalized row as prompt, completion and reference.

    Raises :class:`DataError` if ``answer`` or ``output`` has the wrong type.
    """
    given = row.get("answer")
    if not isinstance(given, str) or not given.strip():
        raise DataError("'answer' must be a string that is not empty")
    worked = row.get("output")
    if worked is not None and not isinstance(worked, str):
        raise DataError(f"'output' must be a string or null, it is a {type(worked).__name__}")
    right = f"{MARK} {given.strip()}"
    solution = worked if worked is not None and MARK in worked else right
    return {
        "prompt": f"Q: {row['input']}\nA:",
        "completion": f" {solution.strip()}",
        "reference": right,
    }
