"""Imports only go down, as read from the sources.

A new folder or top-level module gets its place in ``STORE`` or ``TRAINER``: it may import the
groups of the rows above its own, and no others.
"""

from __future__ import annotations

import ast

import pytest

from docs.module_graph import (
    ROOT,
    group_of,
    imports,
    inner_imports,
    module_graph,
    reachable,
    sources,
)

STORE = """
errors
_util
format retention
codec storage
objects
tensors
pipeline
maintenance
remote
store
saver address
timeline
cli integrations testing
__init__
"""

TRAINER = """
errors signals text
files distributed config
journal data algorithms
report model
training
comparison simulate hf
api
cli
__init__ __main__
"""

ORDERS = {
    package: {
        group: row for row, groups in enumerate(order.split("\n")) for group in groups.split()
    }
    for package, order in (("msft_store", STORE), ("trainer", TRAINER))
}

PURE = ("config", "data.schedule", "journal", "algorithms", "report.plan")
"""Modules that decide, with their groups: no tensors, no devices."""

HEAVY = {"torch", "accelerate", "transformers", "safetensors", "msft_store"}

UNPICKLED = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that run code out of data."""

CALLS = {"torch.load", "torch.save", "eval", "exec", "__import__"}

DOORS = {
    "msft_store",
    "msft_store.integrations.dcp",
    "msft_store.integrations.hf",
    "msft_store.integrations.model_files",
    "msft_store.integrations.training_state",
}
"""The modules of the store that the trainer may import from."""

OPTIONAL = {"datasets", "fsspec", "obstore", "peft", "pyarrow", "torchao"}
"""Dependencies that may be missing, and may therefore be imported inside a function."""


def upward(graph: dict[str, set[str]], order: dict[str, int]) -> list[str]:
    """Return the imports between groups that do not go down."""
    return [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in sorted(imported)
        if group_of(other) != group_of(module) and order[group_of(other)] >= order[group_of(module)]
    ]


def foreign_private_names(package: str, trees: dict[str, ast.Module]) -> list[str]:
    """Return the underscore names that a group takes from another one."""
    return [
        f"{module} imports {name} from {source}"
        for module, tree in trees.items()
        for source, name in imports(tree)
        if source.startswith(f"{package}.") and name and name.startswith("_")
        if group_of(source.partition(".")[2]) != group_of(module)
    ]


def imports_in_functions(tree: ast.AST) -> list[str]:
    """Return the modules imported inside functions, except optional dependencies."""
    return [
        module
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for module, _ in imports(node)
        if module.partition(".")[0] not in OPTIONAL
    ]


def code_out_of_data(tree: ast.AST) -> list[str]:
    """Return the imports and calls that run code out of data."""
    found = [module for module, _ in imports(tree) if module.partition(".")[0] in UNPICKLED]
    found += [f"{m}.{n}" for m, n in imports(tree) if f"{m}.{n}" in CALLS]
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return found + [call for call in calls if call in CALLS]


def public_names(package: str) -> set[str]:
    """Return ``__all__``, from the package's stub."""
    stub = ast.parse((ROOT / package / "__init__.pyi").read_text(encoding="utf-8"))
    (names,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    return set(ast.literal_eval(names))


@pytest.mark.parametrize("package", ORDERS)
def test_every_group_has_its_place_and_few_are_modules_at_the_top(package: str) -> None:
    assert {group_of(module) for module in sources(package)} == set(ORDERS[package])
    assert len(list((ROOT / package).glob("*.py"))) <= 10


@pytest.mark.parametrize("package", ORDERS)
def test_imports_only_go_down(package: str) -> None:
    assert upward(module_graph(package), ORDERS[package]) == []


@pytest.mark.parametrize("package", ORDERS)
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    graph = module_graph(package)
    assert [module for module in graph if module in reachable(module, graph)] == []


@pytest.mark.parametrize("package", ORDERS)
def test_no_group_takes_underscore_names_of_another(package: str) -> None:
    assert foreign_private_names(package, sources(package)) == []


def test_the_store_knows_nothing_of_the_trainer() -> None:
    for name, tree in sources("msft_store").items():
        tops = {module.partition(".")[0] for module, _ in imports(tree)}
        assert "trainer" not in tops, name


def test_the_trainer_uses_only_the_public_names_of_the_store() -> None:
    public = public_names("msft_store")
    for name, tree in sources("trainer").items():
        for module, imported in imports(tree):
            if module.partition(".")[0] == "msft_store":
                assert module in DOORS, f"{name} imports {module}"
                assert module != "msft_store" or imported in public, (
                    f"{name} imports {imported} from msft_store"
                )


@pytest.mark.parametrize("start", PURE)
def test_modules_that_decide_are_pure(start: str) -> None:
    trees, graph = sources("trainer"), module_graph("trainer")
    starts = {name for name in graph if name == start or name.startswith(f"{start}.")}
    for name in starts.union(*(reachable(module, graph) for module in starts)):
        tops = {module.partition(".")[0] for module, _ in imports(trees[name])}
        assert not tops & HEAVY, f"{start} reaches {name}, which imports {tops & HEAVY}"


@pytest.mark.parametrize("package", ORDERS)
def test_no_import_inside_a_function(package: str) -> None:
    found = {name: imports_in_functions(tree) for name, tree in sources(package).items()}
    assert {name: modules for name, modules in found.items() if modules} == {}


@pytest.mark.parametrize("package", ORDERS)
def test_data_is_never_run_as_code(package: str) -> None:
    found = {name: code_out_of_data(tree) for name, tree in sources(package).items()}
    assert {name: uses for name, uses in found.items() if uses} == {}


def test_an_upward_import_a_circle_and_a_foreign_private_name_are_seen() -> None:
    trees = {
        "errors": ast.parse("from trainer import cli"),
        "data.peaks": ast.parse("from trainer.data import rows"),
        "data.rows": ast.parse("if TYPE_CHECKING:\n    import trainer.data.peaks"),
        "cli": ast.parse("import trainer.errors\nfrom trainer.data.rows import _load"),
    }
    graph = {name: inner_imports(tree, "trainer", trees) for name, tree in trees.items()}
    assert upward(graph, {"errors": 0, "data": 1, "cli": 2}) == ["errors imports cli"]
    circles = {name for name in graph if name in reachable(name, graph)}
    assert circles == {"errors", "cli", "data.peaks", "data.rows"}
    assert foreign_private_names("trainer", trees) == ["cli imports _load from trainer.data.rows"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n    import os.path", ["os.path"]),
        ("class A:\n    async def f(self):\n        from os import path", ["os"]),
        ("import os\n\ndef f():\n    pass", []),
    ],
)
def test_an_import_inside_a_function_is_seen(text: str, found: list[str]) -> None:
    assert imports_in_functions(ast.parse(text)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("from torch import load", ["torch.load"]),
        ("torch.load(path)", ["torch.load"]),
        ("eval(text)", ["eval"]),
        ("model.eval()", []),
        ("safetensors.torch.load(data)", []),
    ],
)
def test_code_out_of_data_is_seen(text: str, found: list[str]) -> None:
    assert code_out_of_data(ast.parse(text)) == found
