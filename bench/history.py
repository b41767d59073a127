"""A dense history: what each commit of a run takes, and how long it takes to load any of them.

Real training of the example's base model, with a commit after every optimizer step. Each commit is
compared with what it takes against the commit before it alone, and against the root of the branch.

Example::

    python -m bench.history --commits 150
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.codec import RESULTS, machine
from bench.trajectories import EXAMPLE, REGIMES, causal_lm
from msft_store import Checkpoint, KeepLast, Store, Timeline
from msft_store.codec import codecs
from msft_store.format.dtypes import dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.tensors.bytes import read_elements
from trainer.text import Table

SUMMARY = "Measure the size and the load time of each commit of a run."
REGIME = REGIMES[0]
LOADS = 6
"""Loads of each checkpoint; the fastest counts."""
ABOUT = """\
{cpu}, {date}, commit {commit}.

The example's base model (causal LM of 2.5 M parameters, all trained, {regime}), one commit after
each of {commits} optimizer steps, all kept. Sizes in % of a full checkpoint, manifests left out:
{mean:.3f} on average; against the commit before it alone {previous:.3f} (ratio {near:.2f}, at most
1.5 asked); against the root of the branch {root:.3f} (ratio {far:.2f}, at most 0.4 asked). Loading
any of them takes {median:.2f} times as long as one of depth 1 at the median (at most 2 asked), and
{worst:.2f} times at the depth that is slowest (at most 3 asked).
"""
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """All commits of one depth."""

    depth: int
    commits: int
    percent: float
    """Mean size, in % of a full checkpoint."""
    load: float
    """Median time of a load, in loads of depth 1."""


def states(count: int) -> Iterator[State]:
    """Train; yield the weights before the first step and after each step."""
    model, loss = causal_lm(REGIME.weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=REGIME.lr)
    for step in range(count + 1):
        yield {
            name: tensor.detach().to(REGIME.snapshots).clone()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }
        loss(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def encoded_bytes(state: State, reference: State) -> int:
    """Return the bytes of a state dict as changes of another one."""
    total = 0
    for name, tensor in state.items():
        step = CHUNK_BYTES // tensor.element_size()
        for start in range(0, tensor.numel(), step):
            end = min(start + step, tensor.numel())
            new, old = (read_elements(one[name], start, end) for one in (state, reference))
            total += len(codecs.encode(new, old, dtype_by_torch(tensor.dtype))[1])
    return total


def load_times(store: Store, commits: Iterable[Checkpoint], target: State) -> dict[str, float]:
    """Return the shortest time of a load of each commit, by id, in seconds."""
    times: dict[str, float] = {}
    for _ in range(LOADS):
        for commit in commits:
            begin = time.perf_counter()
            store.load_into(target, commit)
            taken = time.perf_counter() - begin
            times[commit.id] = min(taken, times.get(commit.id, taken))
    return times


def measure(path: Path, found: Iterator[State]) -> tuple[list[Row], dict[str, float]]:
    """Commit states to a new store; return rows by depth, and the figures of the whole history."""
    store = Store.create(path)
    line = Timeline(store, store.add_base(EXAMPLE / "base"), retention=KeepLast(10**6))
    root = before = next(found)
    commits, near, far = [], 0, 0
    for step, state in enumerate(found, 1):
        commits.append(line.commit(state, step=step))
        near, far = near + encoded_bytes(state, before), far + encoded_bytes(state, root)
        before = state
    whole = len(commits) * commits[0].logical_bytes / 100
    mean = sum(commit.stored_bytes for commit in commits) / whole
    times = load_times(store, commits, {name: t.clone() for name, t in root.items()})
    depths: dict[int, list[Checkpoint]] = {}
    for commit in commits:
        depths.setdefault(store.depth(commit), []).append(commit)
    one = statistics.median(times[commit.id] for commit in depths[1])
    rows = [
        Row(
            depth=depth,
            commits=len(some),
            percent=100 * statistics.fmean(c.stored_bytes / c.logical_bytes for c in some),
            load=statistics.median(times[c.id] for c in some) / one,
        )
        for depth, some in sorted(depths.items())
    ]
    return rows, {
        "commits": len(commits),
        "mean": mean,
        "previous": near / whole,
        "root": far / whole,
        "near": mean * whole / near,
        "far": mean * whole / far,
        "median": statistics.median(times.values()) / one,
        "worst": max(row.load for row in rows),
    }


def report(rows: list[Row], figures: dict[str, float], about: dict[str, str]) -> str:
    """Return the result as Markdown."""
    table = Table(
        header=("depth", "commits", "% of a checkpoint", "load, depth 1 = 1"),
        rows=[
            (str(row.depth), str(row.commits), f"{row.percent:.3f}", f"{row.load:.2f}")
            for row in rows
        ],
    )
    text = ABOUT.format(**about, regime=REGIME.name, **figures)
    return f"{text}\n{table.to_markdown()}\n"


def main() -> None:
    """Measure; write ``bench/results/history.{md,json}``."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--commits", type=int, default=150)
    count = parser.parse_args().commits
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, figures = measure(Path(folder, "store"), states(count))
    save(rows, figures, machine())


def save(rows: list[Row], figures: dict[str, float], about: dict[str, str]) -> None:
    """Write and print the result."""
    text = report(rows, figures, about)
    (RESULTS / "history.md").write_text(text, encoding="utf-8")
    document = {**about, **figures, "rows": [asdict(row) for row in rows]}
    (RESULTS / "history.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
