"""Measure every rival on pairs of checkpoints from real training, on one core.

A rival writes the newer state of a pair, given the older one. Its processor time is that of the
whole process, without reading the two states; of a rival that takes less than half a second, the
faster of two runs counts. What is read back is compared bit for bit. A row is kept while the
states, the rival's version and, for ours, the last commit of the package are the same, so a run
that was stopped continues.

Example::

    python -m bench.arena                           # what is not measured yet, and the tables
    python -m bench.arena --again --only ours       # some rivals once more
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import safetensors.torch
import xxhash

from bench.arena import table
from bench.arena.rivals import RIVALS, Rival, State, lanes
from bench.codec import RESULTS, machine
from bench.trajectories import DATA

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MOONCLIP_THREADS": "1", "MSFT_STORE_NUMBA": "1"}
"""One thread, and our loops compiled before the first of them runs."""
LONG = 0.5
"""Seconds of processor from which on one run has to do."""
WARM = 1 << 20
"""The most bytes of a tensor on which a rival is tried first."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two states of one training."""

    model: str
    regime: str
    old: Path
    new: Path

    @property
    def name(self) -> str:
        """The steps, older first."""
        return f"{self.old.stem[4:]}→{self.new.stem[4:]}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rival took for one state."""

    size: int = 0
    encode: float = 0.0
    decode: float = 0.0
    """Seconds of processor."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes by kind of file, if the rival writes several."""


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One rival on one pair."""

    model: str
    regime: str
    pair: str
    states: str
    """A digest of both files."""
    rival: str
    version: str
    """Of the rival's package; for ours, the last commit that changed it."""
    full: int
    """Bytes of the newer state's tensors."""
    exact: bool = False
    reason: str = ""
    """Why the rival was not measured."""


def wanted(steps: list[int]) -> list[tuple[int, int]]:
    """Return the pairs of sorted steps to measure: a step to the next, and ever longer ones."""
    first, last = steps[0], steps[-1]
    found = [(0, 1), (1, 2), (last - 1, last), (0, 16), (0, 100), (first, last)]
    return [pair for pair in dict.fromkeys(found) if {*pair} <= {*steps}]


def pairs(data: Path) -> Iterator[Pair]:
    """Yield all pairs: of the language model, and of the small models of ``bench.trajectories``."""
    homes = {table.MODEL: data, **{name: DATA / name for name in table.SMALL_MODELS}}
    for model, home in homes.items():
        for folder in sorted(path for path in home.glob("*") if any(path.glob("step*"))):
            steps = sorted(int(path.stem[4:]) for path in folder.glob("step*.safetensors"))
            for pair in wanted(steps):
                old, new = (folder / f"step{step}.safetensors" for step in pair)
                yield Pair(model=model, regime=folder.name, old=old, new=new)


def measure(rival: type[Rival], old: State, file: Path, new: State) -> Measured:
    """Let a rival write and read a state; :class:`AssertionError` if what it read is different."""
    with tempfile.TemporaryDirectory(prefix="arena-") as folder:
        one = rival(Path(folder))
        one.prepare(old, file)
        began = time.process_time()
        size = one.encode(new)
        middle = time.process_time()
        found = one.decode()
        ended = time.process_time()
    assert found.keys() == new.keys(), "other names were read back"
    for name, tensor in new.items():
        same = found[name].dtype == tensor.dtype and lanes(found[name]).equal(lanes(tensor))
        assert same, f"{name} was read back with other bits"
    encode, decode = round(middle - began, 4), round(ended - middle, 4)
    return Measured(size=size, encode=encode, decode=decode, parts=one.parts)


def warm_up(rival: type[Rival], old: State, new: State) -> None:
    """Run a rival on a few tensors, for what it loads or compiles at first."""
    names = sorted((name for name in new if new[name].nbytes <= WARM), key=lambda n: new[n].nbytes)
    few = names[-2:] or list(new)[:1]
    with tempfile.TemporaryDirectory(prefix="arena-") as folder:
        file = Path(folder) / "old.safetensors"
        safetensors.torch.save_file({name: old[name] for name in few}, file)
        measure(rival, {n: old[n] for n in few}, file, {n: new[n] for n in few})


def fill(row: Row, file: Path, old: State, new: State) -> Row:
    """Measure the rival of a row; if it fails, the row says why.

    Args:
        row: The row without results.
        file: The older state.
        old: The same, loaded.
        new: The newer state.
    """
    rival = RIVALS[row.rival]
    try:
        warm_up(rival, old, new)
        one = measure(rival, old, file, new)
        if one.encode + one.decode < LONG:
            again = measure(rival, old, file, new)
            encode, decode = min(one.encode, again.encode), min(one.decode, again.decode)
            one = replace(one, encode=encode, decode=decode)
    except Exception as error:
        return replace(row, reason=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return replace(row, **vars(one), exact=True)


def line_of(row: Row) -> str:
    """Return a row as a line of the terminal."""
    share = f"{row.size / row.full:.4%}, {row.encode:.2f} s, {row.decode:.2f} s"
    return f"{row.model} {row.regime} {row.pair} {row.rival}: {row.reason or share}"


def version_of(rival: type[Rival]) -> str:
    """Return the version of a rival, or that it is not installed."""
    try:
        return rival.version()
    except ImportError:
        return "not installed"


def load(path: Path) -> State:
    """Read a state into memory of its own."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def digest(*paths: Path) -> str:
    """Return a digest of the contents of files."""
    return xxhash.xxh3_128_hexdigest(
        b"".join(xxhash.xxh3_128_digest(p.read_bytes()) for p in paths)
    )


def main() -> None:
    """Measure what is missing, write each result at once, and renew tables and plot at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA / "smollm2", help="the trajectories")
    parser.add_argument("--only", default="", help="a part of the names of the rivals to measure")
    parser.add_argument("--again", action="store_true", help="measure them even if they have rows")
    options = parser.parse_args()
    cores = os.cpu_count()
    if len(os.sched_getaffinity(0)) > 1 or ONE_THREAD.items() - os.environ.items():
        # Libraries choose their numbers of threads when they are loaded, so this begins again.
        os.environ.update(ONE_THREAD)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.execv(sys.executable, [sys.executable, "-m", "bench.arena", *sys.argv[1:]])  # noqa: S606
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    file = RESULTS / "arena.json"
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    rows = {(row["model"], row["regime"], row["pair"], row["rival"]): Row(**row) for row in before}
    versions = {name: version_of(rival) for name, rival in RIVALS.items()}
    measured = list(pairs(options.data))
    names = {(pair.model, pair.regime, pair.name) for pair in measured}
    rows = {key: row for key, row in rows.items() if key[:3] in names}
    for pair in measured:
        states = digest(pair.old, pair.new)
        chosen = {name: version for name, version in versions.items() if options.only in name}
        for name, version in list(chosen.items()):
            row = rows.get((pair.model, pair.regime, pair.name, name))
            if row and (row.states, row.version) == (states, version) and not options.again:
                del chosen[name]
        if not chosen:
            continue
        old, new = load(pair.old), load(pair.new)
        for name, version in chosen.items():
            row = Row(
                model=pair.model,
                regime=pair.regime,
                pair=pair.name,
                states=states,
                rival=name,
                version=version,
                full=sum(tensor.nbytes for tensor in new.values()),
            )
            row = fill(row, pair.old, old, new)
            print(line_of(row), flush=True)
            rows[row.model, row.regime, row.pair, row.rival] = row
            table.write({**machine(), "cores": cores}, [asdict(row) for row in rows.values()])
    table.render()


if __name__ == "__main__":
    main()
