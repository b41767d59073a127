"""Saving and loading, compared with peers, on one disk in one run, as ratios to safetensors.

The states are enlarged checkpoints of real training (``bench/trajectories.py``): each tensor is
repeated with its rows rotated, eight copies one below the other, under as many names as necessary.
A save is timed until its bytes are durable (fsync of files and directories). The disk is idle
before it. Loads go into existing tensors, and the files are in the page cache for all ways. Memory
is the largest growth of the resident set of a separate process. A peer that keeps a full copy
writes all of it in every regime.

Example::

    python -m bench.trajectories && python -m bench.store
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench.codec import RESULTS, machine
from bench.manystore import make
from bench.trajectories import DATA, REGIMES
from bench.ways import OURS, SAFETENSORS, WAYS, Ours, states
from msft_store import AsyncSaver, Champions, Store, Timeline
from msft_store.cli import main as cli
from msft_store.codec import codecs
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.tensors.bytes import to_bytes

SMALL_MODEL = DATA / "causal-lm-2.5M"
LONG_RUN, BRANCH = 200, 11
"""Commits of the long run, and after how many there is a roll-back."""
MANY = (1000, 1500)
"""Checkpoints, and chunks of each, of the store that is listed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to keep one state."""

    regime: str
    way: str
    gigabytes: float
    save: float
    """Seconds until the checkpoint is durable."""
    load: float
    """Seconds into tensors that are there."""
    save_cpu: float
    load_cpu: float
    """CPU seconds of all threads."""
    save_adds: float
    """MB of resident memory, at most, besides the tensors."""
    load_adds: float
    stored: float
    """Bytes on disk, of the full state."""


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Give a list that holds, at the end, by how many MB the resident set grew at most."""
    found: list[float] = []
    begin, highest, done = resident(), [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    done.set()
    thread.join()
    found.append(highest[0] - begin)


def resident() -> float:
    """Return the resident set of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(way: str, regime: str, gigabytes: float, folder: Path, base: Path) -> Row:
    """Save and load a state in one way, in this process."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before, state = states(regime, gigabytes)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    keeper = WAYS[way](folder, base)
    keeper.prepare()
    # Once in small, for what is compiled or imported at the first call.
    keeper.save({name: before[name] + 1 for name in list(before)[:3]})
    del before
    used = disk_bytes(folder)
    os.sync()
    with peak_memory() as save_adds:
        began = time.process_time()
        saving, save_cpu = seconds(lambda: keeper.save(state)), time.process_time() - began
    stored = disk_bytes(folder) - (used if issubclass(WAYS[way], Ours) else 0)
    with peak_memory() as load_adds:
        began = time.process_time()
        loading, load_cpu = seconds(lambda: keeper.load_into(target)), time.process_time() - began
    for name, tensor in state.items():
        same = torch.equal(target[name].view(torch.uint8), tensor.view(torch.uint8))
        assert same, f"{way} did not restore {name}"
    total = sum(tensor.nbytes for tensor in state.values())
    return Row(
        regime=regime,
        way=way,
        gigabytes=total / 1e9,
        save=saving,
        load=loading,
        save_cpu=save_cpu,
        load_cpu=load_cpu,
        save_adds=save_adds[0],
        load_adds=load_adds[0],
        stored=stored / total,
    )


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def background(regime: str, gigabytes: float, folder: Path, base: Path) -> dict[str, float]:
    """Return for how long a background save blocks its caller, first and again."""
    _, state = states(regime, gigabytes)
    store = Store.create(folder / "store")
    parent = store.add_base(base)
    found = {}
    with AsyncSaver(store) as saver:
        for name in ("first", "again"):
            found[name] = seconds(partial(saver.save, state, parent=parent))
            found[f"{name}, durable"] = found[name] + seconds(saver.wait)
            for tensor in state.values():
                tensor.add_(1)
    return found


def codec_speed(regime: str, gigabytes: float) -> dict[str, float]:
    """Return the speed of the codec alone, GB/s of decoded bytes in one thread."""
    before, after = states(regime, gigabytes)
    chunks = [
        (
            to_bytes(tensor)[at : at + CHUNK_BYTES],
            to_bytes(before[name])[at : at + CHUNK_BYTES],
            dtype_by_torch(tensor.dtype),
        )
        for name, tensor in after.items()
        for at in range(0, tensor.nbytes, CHUNK_BYTES)
    ]
    total = sum(new.size for new, _, _ in chunks) / 1e9
    codecs.encode(*chunks[0])
    began = time.thread_time()
    coded = [codecs.encode(*chunk) for chunk in chunks]
    middle = time.thread_time()
    for (codec, payload), (_, old, dtype) in zip(coded, chunks, strict=True):
        codec.decode_into(payload, old.copy(), dtype)
    return {"encode": total / (middle - began), "decode": total / (time.thread_time() - middle)}


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process; return what it returns."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def disk_speed(folder: Path) -> float:
    """Return GB/s of a large durable write."""
    data = os.urandom(1 << 26)
    file = folder / "speed"
    os.sync()

    def write() -> None:
        with file.open("wb", buffering=0) as out:
            for _ in range(8):
                out.write(data)
            os.fsync(out.fileno())

    taken = seconds(write)
    file.unlink()
    return 8 * len(data) / taken / 1e9


def long_run(folder: Path) -> dict[str, float]:
    """Return seconds to load commits of a run with roll-backs, by their number."""
    files = sorted((SMALL_MODEL / "bf16-1e-5").glob("step*"), key=lambda path: int(path.stem[4:]))
    steps = [safetensors.torch.load_file(file) for file in files]
    torch.manual_seed(0)
    store = Store.create(folder / "store")
    timeline = Timeline(store, store.add_base(files[0]), retention=Champions({"metric": "max"}))
    state = {name: tensor.clone() for name, tensor in steps[0].items()}
    found = {}
    for number in range(1, LONG_RUN + 1):
        for name, tensor in state.items():
            # A fifth of the rows, as they were at some step of the training.
            rows = torch.randperm(len(tensor))[: -(-len(tensor) // 5)]
            tensor[rows] = steps[int(torch.randint(len(steps), ()))][name][rows]
        ckpt = timeline.commit(state, number, {"metric": float(number)})
        if number in (2, BRANCH + 2, LONG_RUN):
            times = [seconds(partial(store.load_into, state, ckpt)) for _ in range(9)]
            found[str(number)] = statistics.median(times[1:])
        if number % BRANCH == 0:
            timeline.rollback(ckpt)
    return found


def many(folder: Path) -> dict[str, float]:
    """Return seconds to open, list and plan a store of many checkpoints, warm."""
    make(folder / "store", *MANY)
    path = str(folder / "store")
    commands = {"log": ["log"], "inspect": ["inspect"], "gc --dry-run": ["gc", "--dry-run"]}
    found: dict[str, float] = {"open": alone(_open, path)}
    for name, arguments in commands.items():
        found[name] = alone(_command, ["--store", path, *arguments])
    return {**found, "import of the package": _import()}


def _open(path: str) -> float:
    return min(seconds(lambda: Store.open(path)) for _ in range(2))


def _command(arguments: list[str]) -> float:
    with redirect_stdout(StringIO()):
        return seconds(lambda: cli.main(arguments))


def _import() -> float:
    code = [sys.executable, "-c", "import msft_store.cli"]
    return seconds(lambda: subprocess.run(code, check=True))


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; all columns but the first two are numbers."""
    ruler = ["---"] * 2 + ["--:"] * (len(header) - 2)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, tuple(ruler), *rows)]
    return "\n".join(lines) + "\n"


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table."""
    peers = {row.regime: row for row in rows if row.way == SAFETENSORS}
    header = ("regime", "way", "save s", "÷", "load s", "÷", "save + MB", "load + MB", "disk %")
    return table(
        header,
        [
            (
                row.regime,
                row.way,
                f"{row.save:.2f}",
                f"{row.save / peers[row.regime].save:.2f}",
                f"{row.load:.2f}",
                f"{row.load / peers[row.regime].load:.2f}",
                f"{row.save_adds:.0f}",
                f"{row.load_adds:.0f}",
                f"{100 * row.stored:.1f}",
            )
            for row in rows
        ],
    )


def codec_table(rows: list[Row], speeds: Mapping[str, Mapping[str, float]]) -> str:
    """Return the codec's own speed beside that of the pipeline around it."""
    found = []
    for row in (row for row in rows if row.way == OURS):
        own, size = speeds[row.regime], row.gigabytes
        save = size * (1 / own["encode"] + 1 / own["decode"]) / row.save_cpu
        load = size / own["decode"] / row.load_cpu
        cells = (own["encode"], own["decode"], size / row.save, size / row.load, save, load)
        found.append((row.regime, *(f"{cell:.2f}" for cell in cells)))
    header = ("regime", "codec encodes", "decodes", "save", "load", "CPU, save", "CPU, load")
    return table(header, found)


def report(document: Mapping[str, Any], rows: list[Row]) -> str:
    """Return all results as Markdown."""
    about, blocked, run = document["machine"], document["background"], document["long_run"]
    listed = document["many"]
    lines = "".join(f"| {name} | {listed[name]:.2f} |\n" for name in listed)
    durable = f"durable after {blocked['first, durable']:.2f} s"
    where = f"{document['cores']} cores of {about['cpu']}"
    when = f"{about['date']}, commit {about['commit']}"
    ratios = ", ".join(f"{run[name] / run['2']:.2f} x ({name})" for name in run if name != "2")
    return f"""{where}, {when}. The disk writes {document["disk"]:.2f} GB/s durably.
States of {rows[0].gigabytes:.2f} GB (of {rows[-1].gigabytes:.2f} GB in fp32).
÷ is relative to safetensors. For all ways, the data that is read is in the page cache.

{markdown(rows)}
Speeds in GB/s, the codec's own in one thread; CPU is the codec's own CPU time as a share of what a
save (which encodes and decodes) and a load take.

{codec_table(rows, document["codec"])}
A background save (bf16-1e-5) blocks its caller for {blocked["first"]:.2f} s the first time and
{blocked["again"]:.2f} s from then on; the first was {durable}.

Loading commits of a run with a roll-back every {BRANCH} commits, against the second: {ratios}; the
second took {1e3 * run["2"]:.1f} ms. The second needs the base alone, those after a roll-back need
their root too.

A store of {MANY[0]:,} checkpoints of {MANY[1]:,} chunks each, seconds in a fresh process that has
imported the package:

| | s |
|---|--:|
{lines}"""


def main() -> None:
    """Measure everything and write ``bench/results/store.{md,json}``."""
    parser = argparse.ArgumentParser(description="Measure saving and loading beside peers.")
    parser.add_argument("--gigabytes", type=float, default=0.3, help="size of a state")
    options = parser.parse_args()
    document: dict[str, Any]
    rows: list[Row] = []
    document = {"machine": machine(), "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(dir=DATA, prefix="store-") as name:
        folder = Path(name)
        document["disk"] = disk_speed(folder)
        document["codec"] = {}
        for regime in [regime.name for regime in REGIMES]:
            base = folder / "base.safetensors"
            safetensors.torch.save_file(states(regime, options.gigabytes)[0], base)
            for way in WAYS:
                with emptied(folder / "run") as run:
                    rows.append(alone(measure, way, regime, options.gigabytes, run, base))
            speed = alone(codec_speed, regime, options.gigabytes / 4)
            document["codec"][regime] = speed
            if regime == REGIMES[0].name:
                with emptied(folder / "run") as run:
                    found = alone(background, regime, options.gigabytes, run, base)
                    document["background"] = found
            print(markdown([row for row in rows if row.regime == regime]), flush=True)
        with emptied(folder / "run") as run:
            document["long_run"] = alone(long_run, run)
        with emptied(folder / "run") as run:
            document["many"] = many(run)
    write(document, rows)


def write(document: dict[str, Any], rows: list[Row]) -> None:
    """Print the results and write them into ``bench/results``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = report(document, rows)
    print(text)
    (RESULTS / "store.md").write_text(text, encoding="utf-8")
    document["rows"] = [asdict(row) for row in rows]
    (RESULTS / "store.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """Give a folder that is new, and remove it afterwards."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
