"""The public names of the package."""

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
from tests.test_layers import public_names

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


def stub() -> ast.Module:
    """Return ``__init__.pyi``, which type checkers and lazy_loader read."""
    return ast.parse((Path(msft_store.__file__).parent / "__init__.pyi").read_text())


def test_the_public_names_are_sorted_and_complete() -> None:
    names = msft_store.__all__
    assert names == sorted(set(names)) == dir(msft_store)
    assert set(names) == public_names("msft_store")
    homes = {
        alias.name: f"msft_store.{node.module}"
        for node in stub().body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == {name: getattr(msft_store, name).__module__ for name in names}
    with pytest.raises(AttributeError, match="Stor"):
        _ = msft_store.Stor


def test_the_version_is_that_of_the_distribution() -> None:
    assert msft_store.__version__ == version("msft-store")


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


@pytest.mark.parametrize(
    ("use", "heavy"),
    [
        ("msft_store", (*HEAVY, "torch", "numpy")),
        ("[getattr(msft_store, name) for name in msft_store.__all__]", HEAVY),
    ],
    ids=["the package", "all of its names"],
)
def test_importing_the_store_imports_nothing_heavy(use: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, msft_store; {use}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
