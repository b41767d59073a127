"""Read who imports whom from the sources, and draw the groups of both packages.

A *group* is a folder of a package, or a module at its top level. The imports are read from the
syntax trees, so nothing is executed and an import under ``TYPE_CHECKING`` counts too.

Example::

    python docs/module_graph.py            # writes docs/groups-light.svg and docs/groups-dark.svg
    python docs/module_graph.py --check    # exits with 1 if the pictures are out of date
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("msft_store", "trainer")
ENTRIES = ("__init__", "__main__")
"""Modules that only pass names on. The pictures leave them out."""

BOX_WIDTH, BOX_HEIGHT, GAP, ROW_HEIGHT, MARGIN, TITLE = 96, 28, 14, 62, 20, 34
"""Lengths in the pictures, in pixels."""
COLOURS = {
    "light": {"box": "#ffffff", "edge": "#8593a5", "frame": "#33527a", "text": "#1b2733"},
    "dark": {"box": "#1d2733", "edge": "#66768a", "frame": "#8fb4e3", "text": "#e6edf3"},
}

Place = tuple[float, float]
"""The upper left corner of a box: x and y in pixels."""


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


def layers(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest path of imports that starts at each group."""
    depths: dict[str, int] = {}

    def depth(group: str) -> int:
        if group not in depths:
            depths[group] = max((depth(other) + 1 for other in graph[group]), default=0)
        return depths[group]

    return {group: depth(group) for group in sorted(graph)}


def direct_edges(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that follow from no longer path, so that the picture stays readable."""
    return [
        (group, other)
        for group in sorted(graph)
        for other in sorted(graph[group])
        if not any(other in reachable(via, graph) for via in graph[group] - {other})
    ]


def drawn_groups(package: str) -> dict[str, set[str]]:
    """Return the group graph of a package without the modules in ``ENTRIES``."""
    groups = group_graph(module_graph(package))
    return {group: groups[group] - set(ENTRIES) for group in groups if group not in ENTRIES}


def place_boxes(graph: Mapping[str, set[str]], left: float) -> tuple[dict[str, Place], float]:
    """Return the place of each group and the width of all; importers are above the imported."""
    depths = layers(graph)
    top = max(depths.values())
    rows = [sorted(g for g in graph if depths[g] == row) for row in range(top, -1, -1)]
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP) - GAP
    places: dict[str, Place] = {}
    for number, row in enumerate(rows):
        wanted = {group: mean_of_importers(group, graph, places, left + width / 2) for group in row}
        row.sort(key=lambda group: (wanted[group], group))
        x = left + (width - len(row) * (BOX_WIDTH + GAP) + GAP) / 2
        for group in row:
            places[group] = (x, MARGIN + TITLE + number * ROW_HEIGHT)
            x += BOX_WIDTH + GAP
    return places, width


def mean_of_importers(
    group: str, graph: Mapping[str, set[str]], places: Mapping[str, Place], otherwise: float
) -> float:
    """Return the mean x of the groups above that import ``group``."""
    above = [places[other][0] for other in sorted(places) if group in graph[other]]
    return sum(above) / len(above) if above else otherwise


def draw_package(package: str, left: float, colours: Mapping[str, str]) -> tuple[list[str], Place]:
    """Return the SVG elements of one package, and its width and height."""
    graph = drawn_groups(package)
    places, width = place_boxes(graph, left)
    lines = [
        f'<text x="{left + width / 2:.1f}" y="{MARGIN + 12}" font-weight="bold" '
        f'fill="{colours["text"]}">{package}</text>'
    ]
    for group, other in direct_edges(graph):
        (x1, y1), (x2, y2) = places[group], places[other]
        x1, x2, y1 = x1 + BOX_WIDTH / 2, x2 + BOX_WIDTH / 2, y1 + BOX_HEIGHT
        bend = (y2 - y1) / 2
        lines.append(
            f'<path d="M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} '
            f'{x2:.1f} {y2:.1f}" fill="none" stroke="{colours["edge"]}"/>'
        )
    for group, (x, y) in sorted(places.items()):
        lines.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{colours["box"]}" stroke="{colours["frame"]}"/>'
        )
        lines.append(
            f'<text x="{x + BOX_WIDTH / 2:.1f}" y="{y + 18.5:.1f}" '
            f'fill="{colours["text"]}">{group}</text>'
        )
    return lines, (width, max(y for _, y in places.values()) + BOX_HEIGHT + MARGIN)


def draw(colours: Mapping[str, str]) -> str:
    """Return the picture of the groups of both packages, as SVG."""
    lines: list[str] = []
    left, height = float(MARGIN), 0.0
    for package in PACKAGES:
        drawn, (width, bottom) = draw_package(package, left, colours)
        lines += drawn
        left, height = left + width + 3 * MARGIN, max(height, bottom)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left - 2 * MARGIN:.0f} '
        f'{height:.0f}" font-family="sans-serif" font-size="13" text-anchor="middle">'
    )
    return "\n".join([head, *lines, "</svg>", ""])


def pictures() -> dict[Path, str]:
    """Return the content of each picture by its path."""
    return {
        ROOT / "docs" / f"groups-{name}.svg": draw(colours) for name, colours in COLOURS.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures, or check that they are up to date."""
    parser = argparse.ArgumentParser(description="Draw the groups of both packages.")
    parser.add_argument("--check", action="store_true", help="only compare the pictures")
    options = parser.parse_args(arguments)
    for path, content in pictures().items():
        if not options.check:
            path.write_text(content, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            print(f"{path.name} is out of date: run python docs/module_graph.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
