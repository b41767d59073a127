"""Loads into existing tensors, beside safetensors, interleaved in one process.

The data is a folder of regimes with snapshots of one training each, as
``bench/trajectories.py`` and ``bench/arena`` make them: ``<folder>/<regime>/step<N>.safetensors``.
The first snapshot is the base. The last one is saved against the base alone, and again at the end
of chains of snapshots, each encoded against the one before it.

All ways load into the same tensors, which hold zeros before each load. Safetensors reads with
``load_file`` and ``copy_``, once as it is and once with an xxh3-128 of each tensor compared with
one of the saved tensor, because a load of ours verifies what it restores. The files are in the page
cache. A round runs each way once; ratios are medians over rounds. "Seconds" are those of the
processor unless they are said to be those of the clock, because the machine may do other work.
Memory is the largest growth of the resident set during the first load of ours.

Example::

    python -m bench.trajectories && python -m bench.loading
    python -m bench.loading --data FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash

from bench.codec import RESULTS, machine
from bench.store import alone, peak_memory, table
from bench.trajectories import DATA
from bench.ways import MODEL, State, copy_into
from msft_store import Checkpoint, Store
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.tensors.bytes import to_bytes, view_bytes

SUMMARY = "Measure loads into existing tensors beside safetensors."
DEPTHS = (1, 5)
"""Lengths of the chains of references to the base."""
ROUNDS = 3
CHANGED = 0.01
"""Share of the chunks that differ from memory in a roll-back."""
OURS, PLAIN, VERIFIED = "ours", "safetensors", "safetensors, verified"
ROLLBACK, UNCHANGED = "ours, 1 % of chunks differ", "ours, nothing differs"
WAYS = (OURS, PLAIN, VERIFIED, ROLLBACK, UNCHANGED)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint, loaded with one number of cores."""

    regime: str
    depth: int
    """Number of references between the checkpoint and the base."""
    cores: int
    gigabytes: float
    stored: float
    """Bytes that the checkpoint takes, as a share of its tensors."""
    seconds: dict[str, float]
    """Seconds of the processor by way."""
    clock: dict[str, float]
    """Seconds of the clock by way."""
    ratio: dict[str, float]
    """Seconds of the processor in those of plain safetensors."""
    clock_ratio: dict[str, float]
    adds: float
    """MB by which the resident set grows at most during the first load of ours."""


def snapshots(folder: Path) -> list[Path]:
    """Return the snapshots of a regime in order."""
    return sorted(folder.glob("step*.safetensors"), key=lambda path: int(path.stem[4:]))


def make_store(path: Path, files: Sequence[Path], depth: int) -> tuple[Store, Checkpoint]:
    """Return a store with the last file as a checkpoint of a depth."""
    store = Store.create(path)
    base = store.add_base(files[0])
    saved: list[Checkpoint] = []
    for file in files[1:][-depth:]:
        state = safetensors.torch.load_file(file)
        saved = [store.save(state, parent=base, references=saved, step=int(file.stem[4:]))]
    return store, saved[0]


def measure(path: Path, checkpoint: str, file: Path, rounds: int) -> dict[str, Any]:
    """Load a checkpoint in all ways, in turns; return the seconds of each round by way."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    store = Store.open(path)
    found = store.get(checkpoint)
    state = {name: one.clone() for name, one in safetensors.torch.load_file(file).items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    digests = {name: _digest(tensor) for name, tensor in state.items()}
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        OURS: (lambda: _clear(target), lambda: store.load_into(target, found)),
        PLAIN: (lambda: _clear(target), lambda: _load_plain(file, target)),
        VERIFIED: (lambda: _clear(target), lambda: _load_verified(file, target, digests)),
        ROLLBACK: (lambda: _change(target, state), lambda: store.load_into(target, found)),
        UNCHANGED: (lambda: copy_into(state, target), lambda: store.load_into(target, found)),
    }
    _clear(target)  # Pages that were never written to are not resident.
    # One tensor first, for what is imported or compiled at the first call.
    store.load(found, [sorted(state, key=lambda name: state[name].nbytes)[len(state) // 2]])
    with peak_memory() as adds:
        store.load_into(target, found)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    clock: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, (prepare, load) in ways.items():
            prepare()
            began, cpu = time.perf_counter(), time.process_time()
            load()
            taken = time.perf_counter() - began, time.process_time() - cpu
            if number:
                clock[way].append(taken[0])
                seconds[way].append(taken[1])
                continue
            # The first round compiles, imports and allocates.
            for name, tensor in state.items():
                assert _same(target[name], tensor), f"{way} did not restore {name}"
    return {"seconds": seconds, "clock": clock, "adds": adds[0]}


def _clear(target: State) -> None:
    for tensor in target.values():
        tensor.zero_()


def _change(target: State, state: State) -> None:
    """Let one of a hundred chunks differ from a state, spread over all of it."""
    copy_into(state, target)
    data = [
        view_bytes(tensor)[at : at + CHUNK_BYTES]
        for tensor in target.values()
        for at in range(0, tensor.nbytes, CHUNK_BYTES)
    ]
    step = round(1 / CHANGED)
    for chunk in data[step // 2 :: step]:
        chunk[::1000] ^= 1


def _load_plain(file: Path, target: State) -> None:
    copy_into(safetensors.torch.load_file(file), target)


def _load_verified(file: Path, target: State, digests: Mapping[str, bytes]) -> None:
    loaded = safetensors.torch.load_file(file)
    for name, tensor in loaded.items():
        assert _digest(tensor) == digests[name]
    copy_into(loaded, target)


def _digest(tensor: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(to_bytes(tensor).data)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    lanes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    word = lanes[dtype_by_torch(one.dtype).size]
    return torch.equal(one.view(word), other.view(word))


@contextmanager
def limited(cores: int) -> Iterator[None]:
    """Let this process and those that it starts use the last few cores only."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def rows_of(folder: Path, rounds: int) -> Iterator[Row]:
    """Measure one regime at each depth that its snapshots allow."""
    files = snapshots(folder)
    all_cores = len(os.sched_getaffinity(0))
    total = sum(tensor.nbytes for tensor in safetensors.torch.load_file(files[-1]).values())
    for depth in (depth for depth in DEPTHS if depth < len(files)):
        with tempfile.TemporaryDirectory(dir=DATA, prefix="loading-") as name:
            store, checkpoint = make_store(Path(name) / "store", files, depth)
            place = (Path(store.path), checkpoint.id, files[-1])
            for cores in (1, all_cores) if depth == DEPTHS[0] and all_cores > 1 else (1,):
                with limited(cores):
                    found = alone(measure, *place, rounds)
                yield Row(
                    regime=folder.name,
                    depth=store.depth(checkpoint),
                    cores=cores,
                    gigabytes=total / 1e9,
                    stored=checkpoint.stored_bytes / total,
                    seconds=_medians(found["seconds"]),
                    clock=_medians(found["clock"]),
                    ratio=_ratios(found["seconds"]),
                    clock_ratio=_ratios(found["clock"]),
                    adds=found["adds"],
                )


def _medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {way: statistics.median(each) for way, each in times.items()}


def _ratios(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {
        way: statistics.median(mine / plain for mine, plain in zip(each, times[PLAIN], strict=True))
        for way, each in times.items()
    }


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    header = (
        "regime",
        "depth",
        "cores",
        "stored %",
        "GB/s a core",
        "÷ safetensors",
        "÷ verified",
        "clock ÷ safetensors",
        "1 % differs, GB/s a core",
        "÷ safetensors",
        "nothing differs, GB/s a core",
        "+ MB",
    )
    return table(
        header,
        [
            (
                row.regime,
                str(row.depth),
                str(row.cores),
                f"{100 * row.stored:.2f}",
                f"{row.gigabytes / row.seconds[OURS]:.2f}",
                f"{row.ratio[OURS]:.2f}",
                f"{row.seconds[OURS] / row.seconds[VERIFIED]:.2f}",
                f"{row.clock_ratio[OURS]:.2f}",
                f"{row.gigabytes / row.seconds[ROLLBACK]:.2f}",
                f"{row.ratio[ROLLBACK]:.2f}",
                f"{row.gigabytes / row.seconds[UNCHANGED]:.2f}",
                f"{row.adds:.0f}",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Measure all regimes; write ``bench/results/loading.{md,json}``."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--data", type=Path, default=MODEL, help="folder of regimes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--print-only", action="store_true", help="write no results")
    options = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for folder in sorted(options.data.iterdir()):
        if len(snapshots(folder)) > 1:
            rows += rows_of(folder, options.rounds)
            print(markdown([row for row in rows if row.regime == folder.name]), flush=True)
            if not options.print_only:
                write(rows, options.data.resolve().name)


def write(rows: Sequence[Row], data: str) -> None:
    """Write the rows so far into ``bench/results``."""
    about, cores = machine(), len(os.sched_getaffinity(0))
    text = (
        f"{cores} shared cores of {about['cpu']}, {about['date']}, commit {about['commit']}; "
        f"{data}, {rows[0].gigabytes:.2f} GB. GB/s a core are of processor time, and so are ratios "
        "that are not said to be of the clock. Two threads of torch wait for each other if other "
        "work takes a core, so the rows of several cores flatter ours on a busy machine.\n\n"
        + markdown(rows)
    )
    document = {"machine": about, "cores": cores, "data": data}
    (RESULTS / "loading.md").write_text(text, encoding="utf-8")
    (RESULTS / "loading.json").write_text(
        json.dumps({**document, "rows": [asdict(row) for row in rows]}, indent=2) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
