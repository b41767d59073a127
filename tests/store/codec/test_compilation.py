"""Saves with a cold cache of Numba: exact at once, compiled once, whatever becomes of the compiler.

The interpreter that compiles is a script that first waits for the test, so that nothing depends on
time. It then finds the loops of this checkout in the cache, so that no test compiles them again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from msft_store import Store
from msft_store.codec import compilation, rehearsal
from msft_store.codec.compilation import NUMBA_VARIABLE
from tests.support.children import LONG, ended
from tests.support.pairs import COMPILED
from tests.support.states import make_state, same_bits, train_step, write_base

pytestmark = pytest.mark.skipif(COMPILED is None, reason="Numba cannot be used")


@dataclass
class Machine:
    """A fresh installation: an empty cache, and an interpreter that waits before it starts."""

    folder: Path
    programs: list[subprocess.Popen[str]]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def run(
        self, store: str, state: str, *, interpreter: str | None = None, **env: str
    ) -> subprocess.Popen[str]:
        """Run ``tests.support.cold`` on a store of its own."""
        arguments = [str(self.folder / name) for name in (store, "base", state)]
        arguments.append(str(self.folder / "waits") if interpreter is None else interpreter)
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.support.cold", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, NUMBA_VARIABLE: "", "NUMBA_CACHE_DIR": str(self.cache), **env},
        )
        self.programs.append(program)
        return program

    @contextmanager
    def compiler(self) -> Iterator[int]:
        """Yield the id of the process that compiles, which goes on afterwards."""
        with (self.folder / "fifo").open("w"):  # waits until the process reads it
            yield self.started()[-1]

    def started(self) -> list[int]:
        """Return the ids of all processes that have been started to compile."""
        file = self.folder / "started"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    state = make_state()
    write_base(tmp_path / "base", state)
    write_base(tmp_path / "after", train_step(state, 0.05, 1))
    os.mkfifo(tmp_path / "fifo")
    script = tmp_path / "waits"
    script.write_text(
        f"#!/bin/sh\necho $$ >> {tmp_path}/started\n"
        f'read line < {tmp_path}/fifo\nexec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    found = Machine(tmp_path, [])
    yield found
    for program in found.programs:
        program.kill()
        program.communicate()
    for compiler in found.started():
        with suppress(ProcessLookupError):
            os.kill(compiler, signal.SIGKILL)


def said(program: subprocess.Popen[str], *, go_on: bool = False) -> str:
    """Return the next line of a program, which may wait for a line first."""
    assert program.stdin is not None
    assert program.stdout is not None
    if go_on:
        program.stdin.write("\n")
        program.stdin.flush()
    return program.stdout.readline().strip()


def test_two_cold_saves_are_exact_and_go_on_with_loops_that_were_compiled_once(
    machine: Machine,
) -> None:
    programs = [machine.run(name, "after") for name in "ab"]
    assert [said(program) for program in programs] == ["plain", "plain"]
    after = load_file(machine.folder / "after")
    warm = Store.create(machine.folder / "warm")
    warm.save(after, parent=warm.add_base(machine.folder / "base"))
    packs = [
        {path.name: path.read_bytes() for path in (machine.folder / name).glob("packs/*")}
        for name in ("a", "b", "warm")
    ]
    assert packs[0] == packs[1] == packs[2] != {}
    for name in "ab":
        store = Store.open(machine.folder / name)
        assert same_bits(store.load(store.log()[0]), after)
    with machine.compiler() as compiler:
        fill_cache(machine)
    assert ended(compiler, LONG)
    assert [said(program, go_on=True) for program in programs] == ["compiled", "compiled"]
    assert [said(program) for program in programs] == ["no child", "no child"]
    assert machine.started() == [compiler]
    later = machine.run("c", "base")
    assert said(later) == "compiled"


def test_if_the_compiling_process_is_killed_the_loops_are_compiled_where_they_are_called(
    machine: Machine,
) -> None:
    program = machine.run("a", "base")
    assert said(program) == "plain"
    with machine.compiler() as compiler:
        os.kill(compiler, signal.SIGKILL)
        assert ended(compiler, LONG)
    assert said(program, go_on=True) == "compiled"
    assert [path.name for path in machine.cache.glob("*/*")] == ["msft_store.lock"]


def test_without_a_folder_for_the_cache_the_loops_are_compiled_where_they_are_called(
    machine: Machine,
) -> None:
    machine.cache.write_text("not a folder")
    program = machine.run("a", "base", NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator")
    assert said(program) == "compiled"
    assert machine.started() == []


def test_without_an_interpreter_to_start_the_loops_are_compiled_where_they_are_called(
    machine: Machine,
) -> None:
    program = machine.run("a", "base", interpreter="")
    assert said(program) == "compiled"


def test_after_a_rehearsal_no_chunk_makes_numba_compile_anything() -> None:
    program = [sys.executable, "-m", "tests.support.rehearsed"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=LONG)
    assert done.stdout.splitlines() == ["nothing is compiled"], done.stderr


def test_a_cached_loop_belongs_to_the_sources_of_all_loops() -> None:
    caches = [getattr(loop, "_cache", None) for loop in vars(COMPILED).values()]
    stamps = {cache._cache_file._source_stamp for cache in caches if hasattr(cache, "_cache_file")}
    assert stamps == {compilation.digest_sources()}


def fill_cache(machine: Machine) -> None:
    """Copy the loops of this checkout into the cache, except the mark that they are complete."""
    list(rehearsal.rehearse_all())
    (folder,) = machine.cache.iterdir()
    for pattern in ("*.nbi", "*.nbc"):
        for file in Path(COMPILED.cache_folder()).glob(pattern):
            shutil.copy2(file, folder)
