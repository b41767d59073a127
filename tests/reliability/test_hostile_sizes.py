"""Decompression bombs and special files are refused in bounded memory and time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.stores.write import write_fast
from tests.support.bombs import BOMBS, STRANGE, Spoil
from tests.support.ledger import Ledger

_SECONDS = 300


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of which each case has a copy."""
    folder = tmp_path_factory.mktemp("written")
    write_fast(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("bomb or gigantic size", BOMBS), ("link, pipe or device in a store", STRANGE)],
    ids=["bombs", "strange"],
)
def test_no_file_takes_more_memory_than_its_real_size(
    written: Path, tmp_path: Path, faults: Ledger, kind: str, cases: dict[str, Spoil]
) -> None:
    stores = []
    for number, spoil in enumerate(cases.values()):
        outside = tmp_path / str(number) / "outside"
        outside.mkdir(parents=True)
        (outside / "kept.json").write_text("secret", "ascii")
        stores.append(shutil.copytree(written / "store", outside.with_name("store")))
        spoil(stores[-1])
    program = [sys.executable, "-m", "tests.support.exercise", *map(str, stores)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=_SECONDS, check=False)
    started = done.stdout.splitlines()
    for name, store in zip(cases, stores, strict=True):
        with faults.inject(kind):
            assert str(store) in started, f"{name}: {done.stderr}"
            assert done.returncode == 0 or str(store) != started[-1], f"{name}: {done.stderr}"
            outside = store.with_name("outside")
            assert [path.name for path in outside.iterdir()] == ["kept.json"], name
            assert (outside / "kept.json").read_text("ascii") == "secret", name
            exported = store.with_name("out")
            assert not any(b"secret" in p.read_bytes() for p in exported.glob("**/*.json")), name
