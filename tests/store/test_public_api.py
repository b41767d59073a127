"""What the package shows to the outside."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import msft_store
from msft_store import StoreError, errors

HEAVY = (
    "transformers",
    "accelerate",
    "matplotlib",
    "yaml",
    "trainer",
    "numba",
    "fsspec",
    "obstore",
)


def test_the_public_names_are_sorted_and_complete() -> None:
    names = msft_store.__all__
    assert names == sorted(set(names))
    assert set(names) <= set(dir(msft_store))
    assert set(names) == set(msft_store._HOME)
    for name in names:
        assert getattr(msft_store, name).__module__ == f"msft_store.{msft_store._HOME[name]}"
    with pytest.raises(AttributeError, match="'Stor'"):
        _ = msft_store.Stor


def test_the_version_is_that_of_the_distribution() -> None:
    assert msft_store.__version__ == version("msft-store")
    assert "__version__" in dir(msft_store)


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse((Path(msft_store.__file__).parent / "__init__.pyi").read_text())
    found = {
        (node.module, alias.name, alias.asname)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found == {
        (f"msft_store.{module}", name, name) for name, module in msft_store._HOME.items()
    }


def test_every_exception_is_public_and_a_store_error() -> None:
    kinds = {n: v for n, v in vars(errors).items() if isinstance(v, type)}
    assert kinds.keys() <= set(msft_store.__all__)
    assert all(issubclass(kind, StoreError) for kind in kinds.values())
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in kinds)


def test_everything_public_is_documented() -> None:
    for name in msft_store.__all__:
        value = getattr(msft_store, name)
        assert inspect.getdoc(value), name
        for part, member in vars(value).items():
            if inspect.isfunction(member) and not part.startswith("_"):
                assert inspect.getdoc(getattr(value, part)), f"{name}.{part}"


def test_importing_the_store_imports_nothing_heavy() -> None:
    code = "import sys, msft_store; [getattr(msft_store, name) for name in msft_store.__all__]; "
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
