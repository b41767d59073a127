"""What the package shows to the outside."""

from __future__ import annotations

import inspect
import subprocess
import sys

import msft_store
from msft_store import StoreError, errors

HEAVY = ("transformers", "accelerate", "matplotlib", "yaml", "trainer")


def test_the_public_names_are_sorted_and_complete() -> None:
    names = msft_store.__all__
    assert names == sorted(set(names))
    shown = {n for n, value in vars(msft_store).items() if not n.startswith("_")}
    modules = {name for name in shown if inspect.ismodule(getattr(msft_store, name))}
    assert shown - modules == set(names)


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
    code = f"import sys, msft_store; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
