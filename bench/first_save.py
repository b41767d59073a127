"""The first save of an installation, in which Numba has compiled nothing yet.

A state of 269 MB in bf16, with the shapes of a Llama of 134.5 M parameters and random weights, is
saved against its base by a fresh process. A share of its weights has moved by one step of the
format. "Seconds" and "processor" are of the save alone, without the process that compiles in the
background. The ways take turns. The result is the least of each, because longer times include other
work on the machine.

Example::

    python -m bench.first_save               # a few minutes; writes results/first_save.{md,json}
    python -m bench.first_save --rounds 1    # prints only
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.codec import RESULTS, machine
from msft_store import Store
from msft_store.codec.compilation import HERE, NEVER, NUMBA_VARIABLE, compiled_kernels
from trainer.text import Table

ROUNDS = 2
LAYERS, WIDTH, INNER, KEYS, WORDS = 30, 576, 1536, 192, 49152
SHARES = (0.005, 0.33)
"""Shares of the weights that move: about one step of training, and many with fp32 masters."""
BACKGROUND = ""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One state of the cache and one place to compile."""

    words: str
    variable: str
    cold: bool


WAYS = (
    Way(words="cold cache, compiled in the save", variable=HERE, cold=True),
    Way(words="cold cache, compiled in the background", variable=BACKGROUND, cold=True),
    Way(words="NumPy alone", variable=NEVER, cold=False),
    Way(words="warm cache", variable=HERE, cold=False),
)


def shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the names and shapes of the model's matrices."""
    yield "embed", (WORDS, WIDTH)
    for layer in range(LAYERS):
        for name, rows in (("q", WIDTH), ("k", KEYS), ("v", KEYS), ("o", WIDTH)):
            yield f"{layer}.{name}", (rows, WIDTH)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH))):
            yield f"{layer}.{name}", shape
        yield f"{layer}.down", (WIDTH, INNER)


def make_states(folder: Path) -> None:
    """Write the base, and a state for each share."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in shapes()
    }
    save_file(state, folder / "base.safetensors")
    for share in SHARES:
        moved = {}
        for name, tensor in state.items():
            hit = torch.rand(tensor.shape, generator=generator) < share
            step = 2 * torch.randint(2, tensor.shape, generator=generator, dtype=torch.int16) - 1
            moved[name] = (tensor.view(torch.int16) + hit * step).view(torch.bfloat16)
        save_file(moved, folder / f"{share}.safetensors")


def save(folder: Path, share: float) -> None:
    """Save a state in this process; print the seconds, and those of the processor."""
    state = load_file(folder / f"{share}.safetensors")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Store.create(Path(place, "store"))
        base = store.add_base(folder / "base.safetensors")
        began, used = time.perf_counter(), time.process_time()
        store.save(state, parent=base)
        print(time.perf_counter() - began, time.process_time() - used, flush=True)
    # The process in the background must not take part in the next measurement.
    compiled_kernels(wait=True)


def run(folder: Path, way: Way, share: float) -> list[float]:
    """Save in a fresh process; return its two numbers."""
    with tempfile.TemporaryDirectory(dir=folder) as cold:
        cache = cold if way.cold else str(folder / "warm")
        done = subprocess.run(
            [sys.executable, "-m", "bench.first_save", "--save", str(folder), str(share)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, NUMBA_VARIABLE: way.variable, "NUMBA_CACHE_DIR": cache},
        )
    return [float(number) for number in done.stdout.split()]


def compile_all(folder: Path) -> float:
    """Fill the warm cache as the process in the background does; return its processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", "from msft_store.codec import rehearsal; rehearsal.main()"],
        check=True,
        env={**os.environ, NUMBA_VARIABLE: HERE, "NUMBA_CACHE_DIR": str(folder / "warm")},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> tuple[dict[str, list[list[float]]], float]:
    """Return the numbers of each way and share in each round, and the cost of compiling."""
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_states(folder)
        compiling = compile_all(folder)
        for _ in range(rounds):
            for share in SHARES:
                for way in WAYS:
                    key = f"{100 * share:g} % of the weights moved, {way.words}"
                    found.setdefault(key, []).append(run(folder, way, share))
    return found, compiling


def table(found: dict[str, list[list[float]]]) -> str:
    """Return a Markdown table of the least numbers."""
    rows = tuple(
        (key, *(f"{min(taken):.2f}" for taken in zip(*numbers, strict=True)))
        for key, numbers in found.items()
    )
    return Table(header=("first save", "seconds", "processor"), rows=rows).to_markdown()


def main() -> None:
    """Measure; write ``bench/results/first_save.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help=f"print only (default: {ROUNDS}, and write)")
    parser.add_argument("--save", nargs=2, metavar=("FOLDER", "SHARE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save:
        save(Path(options.save[0]), float(options.save[1]))
        return
    found, compiling = measure(options.rounds or ROUNDS)
    shown = (
        f"{table(found)}\n\nThe process that compiles all loops takes {compiling:.1f} seconds of "
        "the processor."
    )
    print(shown)
    if options.rounds:
        return
    about = machine()
    head = (
        f"{about['date']}, shared cores of {about['cpu']}, commit {about['commit']}, {ROUNDS} "
        f"rounds in turns.\n\n{__doc__.split('Example::')[0].strip()}"
    )
    (RESULTS / "first_save.md").write_text(f"{head}\n\n{shown}\n", encoding="utf-8")
    text = json.dumps({**about, "compiling": compiling, "found": found}, indent=2) + "\n"
    (RESULTS / "first_save.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
