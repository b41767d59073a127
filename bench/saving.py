"""Durable saves beside safetensors and fsync, in turns in one process, on steps of trajectories.

A trajectory is a folder of snapshots ``step<N>.safetensors`` of one training, and its base is
``--base`` or the first snapshot. Each snapshot is saved by ``save_file`` with an fsync of the file
and its folder, and by ``Store.save``: against the base, and in a chain, where the parent is the
snapshot before, as in a run. A save is timed by the clock and in seconds of the processor, all
threads and the kernel's part included. The ratios are those of neighbours, so that a busy machine
disturbs both. Each round has a new store, because one that has the chunks already would not encode
them. The unchanged rows save the base itself: as the first save of a process, which reads the base,
and later. Memory is the largest growth of the resident set in a save.

Example::

    python -m bench.arena.trajectories && python -m bench.saving
    python -m bench.saving FOLDER/bf16-1e-5 --base MODEL
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench.codec import RESULTS, machine
from bench.store import alone, disk_speed, emptied, table
from bench.trajectories import DATA
from bench.ways import MODEL, Safetensors, State
from msft_store import Base, Checkpoint, Store

FIRST, LATER, ON_BASE, IN_CHAIN = "unchanged, first", "unchanged", "against the base", "in a chain"
ROUNDS = 3
MOST_STEPS = 2
"""Snapshots of one trajectory that are saved, at equal distances in its list."""
_SETTLE = 0.2
"""Seconds after which the time of a file's change is certain to differ from that of the next."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The saves of one snapshot in one way: medians over the rounds."""

    trajectory: str
    threads: int
    way: str
    step: int
    gigabytes: float
    seconds: float
    cpu: float
    """Seconds of the processor."""
    ratio: float
    """Seconds, relative to those of safetensors."""
    cpu_ratio: float
    peer_seconds: float
    peer_cpu: float
    grows: float
    """MB of resident memory, at most, besides the tensors."""
    stored: float
    """Bytes on disk, relative to the tensors."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one call took."""

    seconds: float
    cpu: float
    grows: float


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A save of ours and the peer's save of the same state just before."""

    ours: Taken
    peer: Taken
    stored: float


def take(function: Callable[[], object]) -> Taken:
    """Measure a call. Both ways end with an fsync, and so leave nothing for the next to write."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _memory("VmRSS")
    cpu, began = time.process_time(), time.perf_counter()
    function()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Taken(seconds=seconds, cpu=cpu, grows=_memory("VmHWM") - before)


def _memory(name: str) -> float:
    """Return a figure of this process's memory, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024 / 1e6


def steps_of(folder: Path) -> dict[int, Path]:
    """Return the snapshots of a trajectory by step, in order."""
    files = {int(file.stem[4:]): file for file in folder.glob("step*.safetensors")}
    return dict(sorted(files.items()))


def measure(folder: Path, source: Path, threads: int, rounds: int, scratch: Path) -> list[Row]:
    """Save the steps of one trajectory in this process, on as many cores as it may use."""
    torch.set_num_threads(threads)
    base = scratch / "base.safetensors"
    shutil.copy(source if source.is_file() else source / "model.safetensors", base)
    files = {step: file for step, file in steps_of(folder).items() if step > 0}
    stride = -(-len(files) // MOST_STEPS)
    states = {0: _load(base)} | {step: _load(files[step]) for step in list(files)[::stride]}
    peer = Safetensors(scratch, base)
    warm = Store.create(scratch / "warm")
    warm.save({name: t + 1 for name, t in states[0].items()}, parent=warm.add_base(base))
    os.sync()
    turns: dict[tuple[str, int], list[Turn]] = {}
    for _ in range(rounds):
        with emptied(scratch / "run") as run:
            for way, step, save in _saves(run, base, states):
                saved: list[Checkpoint] = []
                other = take(partial(peer.save, states[step]))
                ours = take(lambda save=save, saved=saved: saved.append(save()))  # type: ignore[misc]
                stored = saved[0].stored_bytes / saved[0].logical_bytes
                turns.setdefault((way, step), []).append(Turn(ours=ours, peer=other, stored=stored))
    sizes = {step: sum(t.nbytes for t in state.values()) / 1e9 for step, state in states.items()}
    return [
        _row(folder.name, threads, place, sizes[place[1]], times) for place, times in turns.items()
    ]


def _saves(
    run: Path, base: Path, states: Mapping[int, State]
) -> Iterator[tuple[str, int, Callable[[], Checkpoint]]]:
    """Yield the saves of one round: way, step and the call."""
    # A touched file is read again, as in a new process.
    store = Store.create(run / "base")
    root = store.add_base(base)
    os.utime(base)
    time.sleep(_SETTLE)
    yield FIRST, 0, partial(store.save, states[0], parent=root)
    yield LATER, 0, partial(store.save, states[0], parent=root, step=1)
    steps = [step for step in states if step > 0]
    for step in steps:
        yield ON_BASE, step, partial(store.save, states[step], parent=root, step=step)
    store = Store.create(run / "chain")
    parent: Base | Checkpoint = store.add_base(base)
    for step in steps:
        yield IN_CHAIN, step, partial(store.save, states[step], parent=parent, step=step)
        parent = store.log()[-1]


def _default_folders() -> list[Path]:
    """Return the trajectories of the pretrained language model, or else of the encoder."""
    starts = sorted((DATA / "smollm2").glob("*/step0.safetensors"))
    return [file.parent for file in starts or sorted(MODEL.glob("*/step0.safetensors"))]


def _load(file: Path) -> State:
    # A copy, because what is mapped would be read from the file during the first save.
    loaded = safetensors.torch.load_file(file)
    return {name: tensor.clone() for name, tensor in loaded.items()}


def _row(
    trajectory: str, threads: int, place: tuple[str, int], gigabytes: float, turns: Sequence[Turn]
) -> Row:
    way, step = place
    return Row(
        trajectory=trajectory,
        threads=threads,
        way=way,
        step=step,
        gigabytes=gigabytes,
        seconds=statistics.median(turn.ours.seconds for turn in turns),
        cpu=statistics.median(turn.ours.cpu for turn in turns),
        ratio=statistics.median(turn.ours.seconds / turn.peer.seconds for turn in turns),
        cpu_ratio=statistics.median(turn.ours.cpu / turn.peer.cpu for turn in turns),
        peer_seconds=statistics.median(turn.peer.seconds for turn in turns),
        peer_cpu=statistics.median(turn.peer.cpu for turn in turns),
        grows=max(turn.ours.grows for turn in turns),
        stored=turns[0].stored,
    )


def report(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the results as Markdown."""
    about = document["machine"]
    lines = [
        (
            row.trajectory,
            f"{row.way}, step {row.step}" if row.step else row.way,
            f"{row.threads}",
            f"{row.seconds:.3f}",
            f"{row.ratio:.2f}",
            f"{row.cpu:.3f}",
            f"{row.cpu_ratio:.2f}",
            f"{row.gigabytes / row.cpu:.2f}",
            f"{row.grows:.0f}",
            f"{100 * row.stored:.3f}",
        )
        for row in rows
    ]
    header = ("trajectory", "save", "threads", "s", "÷", "CPU s", "÷", "GB/s a core", "+ MB", "%")
    return (
        f"{about['date']}, commit {about['commit']}, {document['cores']} shared cores of "
        f"{about['cpu']}. The disk writes {document['disk']:.2f} GB/s durably. States of "
        f"{rows[0].gigabytes:.3f} GB. ÷ is relative to `safetensors.torch.save_file` and fsync of "
        f"the same state just before; medians of {document['rounds']} rounds. GB/s a core is the "
        "state's size by seconds of the processor. % is the checkpoint's share of the state.\n\n"
        f"{table(header, lines)}"
    )


def main() -> None:
    """Measure trajectories and write ``bench/results/saving.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="*", type=Path, help="trajectories (default: the language model's, if any)"
    )
    parser.add_argument("--base", type=Path, help="model before the training (default: step 0)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="write nothing")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rows: list[Row] = []
    document: dict[str, Any] = {
        "machine": machine(),
        "cores": len(cores),
        "rounds": options.rounds,
    }
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, prefix="saving-") as name:
        document["disk"] = disk_speed(Path(name))
        for folder in options.folders or _default_folders():
            base = options.base or next(iter(steps_of(folder).values()))
            for threads in (2, 1):
                os.sched_setaffinity(0, cores[-threads:])
                with emptied(Path(name) / "one") as scratch:
                    rows += alone(measure, folder, base, threads, options.rounds, scratch)
                os.sched_setaffinity(0, cores)
            here = [row for row in rows if row.trajectory == folder.name]
            print(report(document, here), flush=True)
            if not options.quick:
                write(document, rows)


def write(document: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the results so far."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "saving.md").write_text(report(document, rows), encoding="utf-8")
    text = json.dumps({**document, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    (RESULTS / "saving.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
