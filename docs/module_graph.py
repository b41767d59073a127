"""Read who imports whom from the sources, and draw the groups of both packages.

A *group* is a folder of a package, or a module at its top level. The imports are read from the
syntax trees, so nothing is executed and an import under ``TYPE_CHECKING`` counts too.

Example::

    python docs/module_graph.py            # writes docs/groups-light.svg and docs/groups-dark.svg
    python docs/module_graph.py --check    # exits with 1 if the pictures are out of date
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("msft_store", "trainer")


def sources(package: str) -> dict[str, ast.Module]:
    """Return the syntax trees of a package by dotted name inside it; ``__init__`` is its root."""
    folder = ROOT / package
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        trees[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) for each imported name and (module, None) for a plain import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: imports are absolute")
            yield from ((node.module or "", alias.name) for alias in node.names)


def inner_imports(tree: ast.AST, package: str, modules: Mapping[str, object]) -> set[str]:
    """Return the modules of ``package`` that a source imports, by dotted name inside it."""
    found = set()
    for module, name in imports(tree):
        top, _, inside = module.partition(".")
        if top != package:
            continue
        below = f"{inside}.{name}" if inside else str(name)
        found.add(below if below in modules else inside or "__init__")
    return found


def module_graph(package: str) -> dict[str, set[str]]:
    """Return the modules that each module of a package imports."""
    trees = sources(package)
    return {name: inner_imports(tree, package, trees) for name, tree in trees.items()}


def group_of(module: str) -> str:
    """Return the folder or the top-level module that a dotted name belongs to."""
    return module.partition(".")[0]


def group_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the groups that each group imports, itself left out."""
    groups: dict[str, set[str]] = {group_of(module): set() for module in graph}
    for module, imported in graph.items():
        groups[group_of(module)] |= {group_of(other) for other in imported} - {group_of(module)}
    return groups


def reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Return the modules that ``start`` imports, directly or not; with itself only in a circle."""
    seen: set[str] = set()
    todo = set(graph[start])
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= graph[name] - seen
    return seen
