"""Docstrings name their subject: few begin with a clause in the place of a noun."""

from __future__ import annotations

import ast

import pytest

from docs.module_graph import PACKAGES, sources

CLAUSES = ("What", "Whether", "Which", "Where", "Whoever")
"""First words of a docstring that describes a thing by a clause instead of by its name."""
MOST = 0.03


def docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of a module, its classes, functions and documented values."""
    found = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value.value
                found += [value.strip()] if isinstance(value, str) else []
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_few_docstrings_begin_with_a_clause_in_the_place_of_a_noun(package: str) -> None:
    texts = [
        (module, text) for module, tree in sources(package).items() for text in docstrings(tree)
    ]
    found = [
        f"{module}: {text.splitlines()[0]}"
        for module, text in texts
        if text.split(maxsplit=1)[:1] and text.split(maxsplit=1)[0] in CLAUSES
    ]
    assert len(found) <= MOST * len(texts), "\n".join(found)
