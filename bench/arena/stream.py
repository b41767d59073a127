"""The stream of weights on the real language model: a version published after each training step.

A follower that holds the version before goes to each new one. All that it reads is counted: the
ref, the manifest, the packs, and the requests, each with :data:`OVERHEAD` bytes of headers. Beside
it, on the same pair of versions, stand XOR + zstd-1 a tensor, sparse safetensors and ARC v3, by
their payloads or files alone. Times are of the processor as well as of the clock, because other
work runs on the machine. Sparse safetensors are applied as an engine would do it: read, then
assigned in place, without any check.

A regime with a row for this version of the package, at least as many steps and the same settings is
not measured again.

Example::

    python -m bench.arena.stream --steps 24     # bench/results/stream.json, docs/BENCHMARKS.md
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench.arena.model import HOME, ensure
from bench.arena.precision import describe
from bench.arena.rivals import Arc, OurStore, Rival, SparseSafetensors, State, Xor, files_of, lanes
from bench.arena.table import words
from bench.arena.trajectories import REGIMES, settings_of, snapshot, steps
from bench.codec import RESULTS, machine
from bench.headline import PAGE
from msft_store import Follower, Store
from msft_store.remote.transport.base import Remote
from msft_store.remote.transport.url import connect_remote
from trainer.text import Table

SUMMARY = "Publish versions of the real language model and follow them."
BEGIN, END = "<!-- stream: python -m bench.arena.stream -->", "<!-- end of stream -->"
FOLLOWED = ("masters-1e-6", "bf16-1e-5")
STEPS = 24
OVERHEAD = 1024
"""Bytes of headers of a request and its answer, about those of a signed request to S3."""
NAME = "policy"
VERSIONS = 1000
"""Versions that the size of a whole run is extrapolated to."""
XOR, SPARSE, ARC = "XOR + zstd-1 a tensor", "sparse safetensors", "ARC v3"
PEERS: dict[str, type[Rival]] = {XOR: Xor, SPARSE: SparseSafetensors, ARC: Arc}
ASKED = {XOR: 0.30, SPARSE: 0.20, ARC: 0.45}
"""The most bytes that a follower shall fetch, in those of each peer."""
KEPT = 0.45
"""The most bytes that a version shall add to the place, in those of XOR + zstd-1."""


class CountingRemote:
    """Another remote; counts the requests of a reader and the bytes of their answers."""

    def __init__(self, inner: Remote) -> None:
        self._inner = inner
        self.requests = self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def reset(self) -> None:
        """Begin to count anew."""
        self.requests = self.bytes = 0

    def size(self, path: str) -> int | None:
        self._count(0)
        return self._inner.size(path)

    def sizes(self, folder: str) -> dict[str, int]:
        found = self._inner.sizes(folder)
        self._count(sum(map(len, found)))
        return found

    def read(self, path: str, offset: int, length: int) -> bytes:
        data = self._inner.read(path, offset, length)
        self._count(len(data))
        return data

    def read_versioned(self, path: str, most: int) -> tuple[bytes, Any] | None:
        found = self._inner.read_versioned(path, most)
        self._count(len(found[0]) if found else 0)
        return found

    def _count(self, size: int) -> None:
        self.requests += 1
        self.bytes += size


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of the clock and of the processor."""

    clock: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version, and what it took to go to it from the version before."""

    step: int
    changed: float
    """Weights that changed since the version before, in % of all."""
    fetched: int
    """Bytes that the follower read, without headers."""
    requests: int
    poll_requests: int
    poll_bytes: int
    """Requests and bytes of an update that finds nothing new."""
    kept: dict[str, int]
    """Bytes that the version added to the place, by folder."""
    peers: dict[str, int]
    """Bytes of the pair by the name of the peer."""
    publish: Timed
    update: Timed
    apply: Timed
    """Applying the sparse safetensors of the same pair."""


def timed(call: Callable[[], object]) -> Timed:
    """Call and time it."""
    clock, cpu = time.perf_counter(), time.process_time()
    call()
    return Timed(
        clock=round(time.perf_counter() - clock, 4), cpu=round(time.process_time() - cpu, 4)
    )


def apply_sparse(path: Path, state: State) -> None:
    """Read a file of indices and values and assign them in place."""
    sparse = safetensors.torch.load_file(path)
    for name, tensor in state.items():
        at = sparse[f"{name}.indices"].long()
        tensor.view(-1)[at] = sparse[f"{name}.values"]


def folders_of(place: Path) -> dict[str, int]:
    """Return the bytes of a place by folder, without those of its base model and its leases."""
    found: dict[str, int] = {}
    for path, size in files_of(place).items():
        if path.parts[0] in ("packs", "steps", "manifests", "refs") and "leases" not in path.parts:
            found[path.parts[0]] = found.get(path.parts[0], 0) + size
    return found


def measure(states: Iterable[tuple[int, State]], base: Path, folder: Path) -> Iterator[Version]:
    """Publish states of one model and follow them; check each against what was published.

    Args:
        states: Steps and weights; the first one is that of the base.
        base: Directory of the base model.
        folder: An empty directory for the store and the place.
    """
    store, place = Store.create(folder / "store"), folder / "place"
    remote = CountingRemote(connect_remote(place))
    before: State = {}
    ours: State = {}
    theirs: State = {}
    follower: Follower | None = None
    for step, now in states:
        kept = folders_of(place)
        publish = timed(partial(store.publish, now, name=NAME, step=step, to=place, base=base))
        if follower is None:
            before, ours, theirs = ({n: t.clone() for n, t in now.items()} for _ in range(3))
            follower = Follower(remote, NAME, into=ours, base=base)
            follower.update()
            continue
        kept = {name: size - kept.get(name, 0) for name, size in folders_of(place).items()}
        remote.reset()
        update = timed(follower.update)
        fetched, requests = remote.bytes, remote.requests
        remote.reset()
        follower.update()
        poll = remote.requests, remote.bytes
        peers = {}
        for name, kind in PEERS.items():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                rival = kind(Path(scratch))
                rival.prepare(before, base)
                peers[name] = rival.encode(now)
                if isinstance(rival, SparseSafetensors):
                    file = Path(scratch, "sparse.safetensors")
                    file.write_bytes(rival.data)
                    apply = timed(partial(apply_sparse, file, theirs))
        assert same(ours, now), "the follower holds other bits"
        assert same(theirs, now), "sparse safetensors gave other bits"
        changed = sum(
            int(torch.count_nonzero(lanes(now[name]) != lanes(before[name]))) for name in now
        )
        yield Version(
            step=step,
            changed=100 * changed / sum(tensor.numel() for tensor in now.values()),
            fetched=fetched,
            requests=requests,
            poll_requests=poll[0],
            poll_bytes=poll[1],
            kept=kept,
            peers=peers,
            publish=publish,
            update=update,
            apply=apply,
        )
        for name, tensor in now.items():
            before[name].copy_(tensor)
    if follower is not None:
        follower.close()


def same(one: State, other: State) -> bool:
    """Return True if all bits of two states are equal."""
    return all(lanes(one[name]).equal(lanes(other[name])) for name in other)


def all_fetched(row: Version) -> int:
    """Return the bytes that a follower fetched, with the headers of its requests."""
    return row.fetched + row.requests * OVERHEAD


def line_of(row: Version) -> str:
    """Return a version as a line of the terminal."""
    peers = ", ".join(f"{name} {size:,}" for name, size in row.peers.items())
    return (
        f"step {row.step}: fetched {all_fetched(row):,} in {row.requests} requests, kept "
        f"{sum(row.kept.values()):,}; {peers}; update {row.update.cpu} s, sparse {row.apply.cpu} s"
    )


def states_of(base: Path, regime: str) -> Iterable[tuple[int, State]]:
    """Yield the base's weights, and those after each step of training."""
    yield 0, safetensors.torch.load_file(base / "model.safetensors")
    for step, (model, _) in enumerate(steps(base, REGIMES[regime]), 1):
        yield step, snapshot(model)


def page(document: dict[str, Any]) -> str:
    """Return the section of ``docs/BENCHMARKS.md``."""
    parts = []
    for name, run in document["regimes"].items():
        rows = [
            Version(
                **{
                    **row,
                    **{key: Timed(**row[key]) for key in ("publish", "update", "apply")},
                }
            )
            for row in run["versions"]
        ]
        parts.append(section(name, run, rows))
    return "\n\n".join(parts)


def section(name: str, run: dict[str, Any], rows: Sequence[Version]) -> str:
    """Return the table of a regime and what it means."""
    mean: Callable[[Iterable[float]], float] = statistics.fmean
    full = run["full"]
    fetched = mean(map(all_fetched, rows))
    peers = {peer: mean(row.peers[peer] for row in rows) for peer in PEERS}
    kept = mean(sum(row.kept.values()) for row in rows)
    late = rows[len(rows) // 2 :]
    whole = VERSIONS * mean(sum(row.kept.values()) for row in late) / full
    chain = VERSIONS * mean(sum(row.kept.values()) - row.kept.get("steps", 0) for row in late)
    figures = [
        (f"bytes fetched a version / {peer}", f"{fetched / peers[peer]:.3f}", f"{asked:.2f}")
        for peer, asked in ASKED.items()
    ]
    figures += [
        (f"bytes kept a version / {XOR}", f"{kept / peers[XOR]:.3f}", f"{KEPT:.2f}"),
        (f"{VERSIONS} versions, extrapolated, in models", f"{whole:.2f}", "1"),
        ("the same without the packs of single steps", f"{chain / full:.2f}", "-"),
        (
            f"what is fetched for {VERSIONS} single steps, in models",
            f"{VERSIONS * fetched / full:.2f}",
            "-",
        ),
        ("requests of an update", f"{mean(row.requests for row in rows):.2f}", "-"),
        ("requests of a poll", f"{mean(row.poll_requests for row in rows):.2f}", "1"),
        ("bytes of the last poll, without headers", f"{rows[-1].poll_bytes}", "-"),
    ]
    for what, key in (("processor", "cpu"), ("clock", "clock")):
        update, apply, publish = (
            statistics.median(getattr(getattr(row, part), key) for row in rows)
            for part in ("update", "apply", "publish")
        )
        figures.append(
            (
                f"update / applying sparse safetensors, {what}, median",
                f"{update / apply:.2f} ({update:.2f} s / {apply:.2f} s)",
                "-",
            )
        )
        figures.append((f"publishing, {what}, median", f"{publish:.2f} s", "-"))
    sizes = [
        (
            row.step,
            f"{row.changed:.3f}",
            *(f"{100 * size / full:.4f}" for size in (all_fetched(row), sum(row.kept.values()))),
            *(f"{100 * row.peers[peer] / full:.4f}" for peer in PEERS),
        )
        for row in rows
        if row.step in (1, 2, 4, 8, 16, 24, 32, 64, 100, 200) or row is rows[-1]
    ]
    parts = ", ".join(
        f"{part} {mean(row.kept.get(part, 0) for row in rows):,.0f}"
        for part in ("packs", "steps", "manifests", "refs")
    )
    about = (
        f"{len(rows)} versions, one after each step of 256 tokens, {full:,} bytes a model; "
        f"products computed {run['products']}. A version adds {kept:,.0f} bytes to the place on "
        f"average: {parts}. The size of {VERSIONS} versions is the mean of the second half, "
        f"extrapolated. "
        f"{run['machine']['date']}, shared cores of "
        f"{run['machine']['cpu']}, measured at commit {run['machine']['commit']} (package of "
        f"commit {run['version']})."
    )
    header = ("step", "changed, %", "fetched, %", "kept, %", *(f"{peer}, %" for peer in PEERS))
    return "\n\n".join(
        [
            f"### {words(name)}",
            about,
            Table(header=("", "measured", "asked, at most"), rows=figures).to_markdown(),
            "In % of the model's bytes, against the version before:",
            Table(header=header, rows=[tuple(map(str, row)) for row in sizes]).to_markdown(),
        ]
    )


def write(document: dict[str, Any]) -> None:
    """Renew the results and the section of the page."""
    text = json.dumps(document, indent=1) + "\n"
    (RESULTS / "stream.json").write_text(text, encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(document)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure the regimes that are not measured yet, and write."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=f"of {', '.join(REGIMES)}")
    parser.add_argument("--data", type=Path, default=HOME, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    base, version = ensure(options.data), OurStore.version()
    file = RESULTS / "stream.json"
    document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"regimes": {}}
    for name in options.regimes or FOLLOWED:
        settings = settings_of(REGIMES[name])
        known = document["regimes"].get(name)
        if (
            known
            and (known["settings"], known["version"]) == (settings, version)
            and len(known["versions"]) >= options.steps
        ):
            continue
        folder = options.data / "stream"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run: dict[str, Any] = {
            "machine": machine(),
            "version": version,
            "settings": settings,
            "products": describe(),
            "full": (base / "model.safetensors").stat().st_size,
            "versions": [],
        }
        document["regimes"][name] = run
        states = islice(states_of(base, name), options.steps + 1)
        for row in measure(states, base, folder):
            print(line_of(row), flush=True)
            run["versions"].append(asdict(row))
            write(document)
        shutil.rmtree(folder)
    write(document)


if __name__ == "__main__":
    main()
