"""Imports only go down, as read from the sources.

A new module gets its place in ``STORE`` or ``TRAINER``: it may import what stands before it, and
only that. A name may stand there before its module exists.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STORE = """
errors render
strict cover
kernels dtypes format paths
tables rans changes lowbits binary compiled loops classes adaptive codecs
keytable tablescan footer
processes lockfiles locks claims
backend
bounded
tensors refs manifest safetensors_file bases base_reader boxes
retention slips
packs overlay objects references liveness catalog salvage
parallel resident pipeline decoding reboxing tree sources stats matching staging looking
check mending survey conditions gc repack diff repair exported export checkpoint_writer
store
saver
space traces alive
timeline
nested
integrations.dcp_boxes integrations.dcp_planners integrations.dcp
integrations.agreement integrations.training_state integrations.adapters
integrations.resume_folder integrations.run_commits integrations.trainer_rules
integrations.hub integrations.hf integrations.accelerate
integrations.remotes integrations.object_errors integrations.object_remote
integrations.fsspec_remote
integrations.directory_remote integrations.addresses integrations.remote_backend
integrations.ref_rules integrations.tally integrations.base_files integrations.shipping
integrations.sending integrations.fetching integrations.remote integrations
figures importing completion
__init__ cli_text cli_check cli_inspect cli_progress cli_remote cli_space cli_tensors cli __main__
"""

TRAINER = """
errors files strategy tables typed yamlfile statistics templates mixturefile sampling
settings datapaths datachecks checks config peaks margins schedule divergence
journal flops plan outbox observed
algorithms.best algorithms.guarded algorithms.sft algorithms.msft
algorithms.continual algorithms.single_rollout algorithms.ies algorithms.dynamix algorithms
disk summary plots report
pause interrupt progress together alarm data sources loading batches sampled
weights sharding snapshot model adapter result
forward optim evaluate
state whole agreement resume course trackers directory workspace lookahead steps commits observing
points
loop
run
children shifts grid comparison comparison_tables figures page comparison_report compare demo
turns simulate holding policies simulated
__init__ cli_compare cli_simulate cli entry __main__
"""

LAYERS = {"msft_store": STORE.split(), "trainer": TRAINER.split()}

PURE = (
    "strategy",
    "settings",
    "checks",
    "config",
    "datapaths",
    "datachecks",
    "templates",
    "mixturefile",
    "sampling",
    "peaks",
    "flops",
    "schedule",
    "plan",
    "journal",
    "algorithms",
)
"""What decides, and what it builds on: no tensors, no devices."""

HEAVY = {"torch", "accelerate", "transformers", "safetensors", "msft_store"}

UNPICKLED = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that run code out of data."""

CALLS = {"torch.load", "torch.save", "eval", "exec", "__import__"}

DOORS = {"msft_store", "msft_store.integrations.dcp"}
"""What other packages may import from."""

OPTIONAL = {"datasets", "fsspec", "obstore", "peft", "pyarrow"}
"""Dependencies that may be missing, and may therefore be imported inside a function."""


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
    """Yield (module, name) for each imported name, (module, None) for a plain import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def inner_imports(tree: ast.AST, package: str, modules: set[str]) -> set[str]:
    """Return the modules of ``package`` that a source imports, by dotted name inside it."""
    found = set()
    for module, name in imports(tree):
        top, _, inside = module.partition(".")
        if top != package:
            continue
        below = f"{inside}.{name}" if inside else str(name)
        found.add(below if below in modules else inside or "__init__")
    return found


def upward(package: str, trees: dict[str, ast.Module]) -> list[str]:
    """Return the imports that do not go down."""
    order = {name: place for place, name in enumerate(LAYERS[package])}
    return [
        f"{name} imports {other}"
        for name, tree in trees.items()
        for other in sorted(inner_imports(tree, package, set(trees)))
        if order.get(other, -1) >= order[name]
    ]


def imports_in_functions(tree: ast.AST) -> list[str]:
    """Return what is imported inside functions, but for optional dependencies."""
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


def reachable(start: str, package: str, trees: dict[str, ast.Module]) -> set[str]:
    """Return ``start`` and all modules of the package that it imports, directly or not."""
    seen: set[str] = set()
    todo = {start} & set(trees)
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= inner_imports(trees[name], package, set(trees)) - seen
    return seen


def public_names(tree: ast.Module) -> set[str]:
    """Return ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_its_place(package: str) -> None:
    assert len(set(LAYERS[package])) == len(LAYERS[package])
    missing = set(sources(package)) - set(LAYERS[package])
    assert not missing, "give the new module its place in STORE or TRAINER"


@pytest.mark.parametrize("package", LAYERS)
def test_imports_only_go_down(package: str) -> None:
    trees = {name: t for name, t in sources(package).items() if name in LAYERS[package]}
    assert upward(package, trees) == []


def test_the_store_knows_nothing_of_the_trainer() -> None:
    for name, tree in sources("msft_store").items():
        tops = {module.partition(".")[0] for module, _ in imports(tree)}
        assert "trainer" not in tops, name


def test_the_trainer_uses_only_the_public_names_of_the_store() -> None:
    public = public_names(sources("msft_store")["__init__"])
    for name, tree in sources("trainer").items():
        for module, imported in imports(tree):
            if module.partition(".")[0] == "msft_store":
                assert module in DOORS, f"{name} imports {module}"
                assert module != "msft_store" or imported in public, (
                    f"{name} imports {imported} from msft_store"
                )


@pytest.mark.parametrize("start", PURE)
def test_what_decides_is_pure(start: str) -> None:
    trees = sources("trainer")
    for name in reachable(start, "trainer", trees):
        tops = {module.partition(".")[0] for module, _ in imports(trees[name])}
        assert not tops & HEAVY, f"{start} reaches {name}, which imports {tops & HEAVY}"


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_inside_a_function(package: str) -> None:
    found = {name: imports_in_functions(tree) for name, tree in sources(package).items()}
    assert {name: modules for name, modules in found.items() if modules} == {}


@pytest.mark.parametrize("package", LAYERS)
def test_data_is_never_run_as_code(package: str) -> None:
    found = {name: code_out_of_data(tree) for name, tree in sources(package).items()}
    assert {name: uses for name, uses in found.items() if uses} == {}


def test_an_upward_import_and_a_cycle_are_seen() -> None:
    trees = {
        "errors": ast.parse("from trainer import cli"),
        "peaks": ast.parse("from trainer.peaks import first_best"),
        "algorithms": ast.parse("from trainer.algorithms.msft import Msft"),
        "algorithms.msft": ast.parse("if TYPE_CHECKING:\n    import trainer.algorithms"),
        "cli": ast.parse("import trainer.errors"),
    }
    assert upward("trainer", trees) == [
        "errors imports cli",
        "peaks imports peaks",
        "algorithms.msft imports algorithms",
    ]
    assert reachable("errors", "trainer", trees) == {"errors", "cli"}


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
